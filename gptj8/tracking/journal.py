"""What a stage has to record, on this disk first: a folder of events and copies of files.

A journal is written by one stage process and its recorder, a line of JSON an event, and is removed
when MLflow has all of it. Whatever happens to the server, to the recorder or to the stage, what was
written stays and can be sent later (`gptj8 sync`), and sending it twice changes nothing: an event
carries the time at which it happened.

    .gptj8/journal/<key of the experiment>/<time>-<stage>/
        events.jsonl    start, metrics, tags, artifact, datasets, stage, end
        files/          copies of what artifacts there are
        state.json      how far it was sent
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.runtime.files import write_json
from gptj8.runtime.project import state_folder

EVENTS = "events.jsonl"
_FILES, _STATE = "files", "state.json"

Event = dict[str, Any]


def journals_folder() -> Path:
    """Return the folder of all journals, a folder an experiment."""
    return state_folder() / "journal"


def journals_of(folder: Path) -> list[Path]:
    """Return the journals of an experiment's folder, in the order in which they were begun; none if
    it is gone."""
    try:
        return sorted(path.parent for path in folder.glob(f"*/{EVENTS}"))
    except FileNotFoundError:
        return []


class JournalWriter:
    """Appends to a journal, from any thread and from more than one process.

    Raises:
        OSError: from every method, where the disk does not take it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Lines of several writers do not mix: a write in append mode is one step.
        self._descriptor = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    @classmethod
    def begin(cls, key: str, stage: str) -> JournalWriter:
        """Make the journal of a stage that starts now. It counts as alive while this process is."""
        writer = cls(journals_folder() / key / f"{time.time_ns()}-{stage}")
        fcntl.flock(writer._descriptor, fcntl.LOCK_EX)
        return writer

    def write(self, event: str, **content: Any) -> None:
        """Append one event, with the time in milliseconds."""
        line = json.dumps({"event": event, "time": now(), **content}, allow_nan=False)
        os.write(self._descriptor, f"{line}\n".encode())

    def keep(self, source: Path, *left_out: str) -> str:
        """Copy a file or directory, and return where it lies in the journal's folder.

        Names in `left_out` are not copied.

        Copied, because a stage's outputs change and, in DVC's copies of the project, vanish.
        """
        kept = Path(_FILES) / f"{time.time_ns()}" / source.name
        (self.folder / kept).parent.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, self.folder / kept, ignore=shutil.ignore_patterns(*left_out))
        else:
            shutil.copyfile(source, self.folder / kept)
        return kept.as_posix()

    def close(self) -> None:
        """Let others see that this process has ended."""
        os.close(self._descriptor)


def read_events(journal: Path, offset: int = 0) -> tuple[list[Event], list[int]]:
    """Return the events from a byte offset on, and the offset behind each.

    A line that is not complete, because it is being written or its writer was killed, is left out.
    """
    with open(journal / EVENTS, "rb") as stream:
        stream.seek(offset)
        content = stream.read()
    events, ends = [], []
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        offset += len(line)
        events.append(json.loads(line))
        ends.append(offset)
    return events, ends


def is_alive(journal: Path) -> bool:
    """Whether the stage that writes the journal is running; it is not if the journal is gone."""
    try:
        with open(journal / EVENTS, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def end_if_killed(journal: Path, time: int) -> None:
    """End the journal of a stage that is gone, at a time in milliseconds, if it did not do so."""
    events, _ = read_events(journal)
    # Not the last one: what the recorder finds out may come behind it.
    if not any(event["event"] == "end" for event in events):
        writer = JournalWriter(journal)
        writer.write("end", status="KILLED", error="the process was killed", time=time)
        writer.close()


def read_state(journal: Path) -> dict[str, Any]:
    """Return how far a journal was sent: `sent` (bytes), `phase`, `reason`; empty if nowhere."""
    try:
        return json.loads((journal / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def update_state(journal: Path, **changes: Any) -> None:
    """Change what the state of a journal says."""
    write_json(journal / _STATE, {**read_state(journal), **changes})


def metric_values(stage: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of nested metrics as `<stage>/<key>`, as they are called in MLflow."""
    return {
        f"{stage}/{key}": float(value)
        for key, value in flatten(metrics, "/").items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def flatten(nested: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Return a flat dict of a nested one, keys joined with `separator`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            flat.update({f"{key}{separator}{name}": item for name, item in inner.items()})
        else:
            flat[str(key)] = value
    return flat


def now() -> int:
    """Return the time in milliseconds since 1970, as MLflow counts it."""
    return time.time_ns() // 1_000_000
