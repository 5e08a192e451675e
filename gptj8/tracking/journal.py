"""Journals: the data that a stage records, kept on the local disk until MLflow has received it.

A journal is a folder with events, one JSON line per event, and copies of files. It is written by
one stage process and its recorder and removed once it was sent completely. If the server, the
recorder or the stage fails, the journal is kept and can be sent later (`gptj8 sync`). Sending it
twice changes nothing, because events carry their original timestamps.

    .gptj8/journal/<key of the experiment>/<time>-<stage>/
        events.jsonl    start, metrics, tags, artifact, datasets, model, stage, end
        files/          copies of the artifacts
        state.json      progress of the sending
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
from stat import S_ISREG
from typing import Any

from gptj8.runtime.dvc_digests import dvc_digest
from gptj8.runtime.files import write_json
from gptj8.runtime.project import state_folder

EVENTS = "events.jsonl"
_FILES, _STATE = "files", "state.json"
_WORTH_SHARING = 65_536
"""Bytes; smaller files are not compared with DVC's cache."""

Event = dict[str, Any]


def journals_folder() -> Path:
    """Return the folder of all journals, which has one folder per experiment."""
    return state_folder() / "journal"


def journals_of(folder: Path) -> list[Path]:
    """Return the journals in an experiment's folder, oldest first; none if it does not exist."""
    try:
        return sorted(path.parent for path in folder.glob(f"*/{EVENTS}"))
    except FileNotFoundError:
        return []


class JournalWriter:
    """Append to a journal; safe to use from several threads and processes.

    Raises:
        OSError: from every method, if writing to the disk fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Writes in append mode are atomic, so lines of several writers do not mix.
        self._descriptor = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    @classmethod
    def begin(cls, key: str, stage: str) -> JournalWriter:
        """Create the journal of a stage. It is active while this process runs."""
        writer = cls(journals_folder() / key / f"{time.time_ns()}-{stage}")
        fcntl.flock(writer._descriptor, fcntl.LOCK_EX)
        return writer

    def write(self, event: str, **content: Any) -> None:
        """Append one event with the current time in milliseconds."""
        line = json.dumps({"event": event, "time": now(), **content}, allow_nan=False)
        os.write(self._descriptor, f"{line}\n".encode())

    def keep(self, source: Path, *left_out: str) -> str:
        """Keep a file or directory in the journal and return its path in the journal's folder.

        A stage's outputs are replaced later or, in DVC's copies of the project, deleted. Hard links
        keep their content and need no disk space before that; afterwards `share_with_cache` frees
        it. Outputs are replaced by renaming and never changed in place. Names in `left_out` are not
        kept.
        """
        kept = Path(_FILES) / f"{time.time_ns()}" / source.name
        (self.folder / kept).parent.mkdir(parents=True)
        if source.is_dir():
            ignore = shutil.ignore_patterns(*left_out)
            shutil.copytree(source, self.folder / kept, ignore=ignore, copy_function=_link)
        else:
            _link(source, self.folder / kept)
        return kept.as_posix()

    def close(self) -> None:
        """Release the lock, so that other processes no longer see the journal as alive."""
        os.close(self._descriptor)


def _link(source: str | Path, target: str | Path) -> None:
    """Create a hard link, or a copy where the file system has none."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def share_with_cache(cache: Path) -> None:
    """Replace what the waiting journals keep by hard links to equal files in DVC's cache.

    While a server stays away, each run leaves an adapter in its journal, and DVC has it as well.
    A file with other links is skipped: it is an output of a stage that is still in place, or it is
    shared already.

    Args:
        cache: DVC's cache of the project, with files named by their MD5.
    """
    for kept in journals_folder().glob(f"*/*/{_FILES}/**/*"):
        try:
            stat = kept.lstat()
            if not S_ISREG(stat.st_mode) or stat.st_size < _WORTH_SHARING or stat.st_nlink > 1:
                continue
            digest = dvc_digest(kept)
            link = kept.with_name(f"{kept.name}.link")
            os.link(cache / "files" / "md5" / digest[:2] / digest[2:], link)
            link.replace(kept)
        except OSError:  # sent and removed meanwhile, not in the cache, or on another file system
            continue


def read_events(journal: Path, offset: int = 0) -> tuple[list[Event], list[int]]:
    """Return the events after a byte offset, and the end offset of each event.

    An incomplete last line is skipped: it is still being written, or its writer was killed.
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
    """Whether the stage that writes the journal is running; False if the journal does not exist."""
    try:
        with open(journal / EVENTS, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def end_if_killed(journal: Path, time: int) -> None:
    """Append an end event with a time in milliseconds, if a stopped stage did not write one."""
    events, _ = read_events(journal)
    # Check all events: the recorder may have appended others after the end.
    if not any(event["event"] == "end" for event in events):
        writer = JournalWriter(journal)
        writer.write("end", status="KILLED", error="the process was killed", time=time)
        writer.close()


def read_state(journal: Path) -> dict[str, Any]:
    """Return the progress of a journal: `sent` (bytes), `phase`, `reason`; empty if not started."""
    try:
        return json.loads((journal / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def update_state(journal: Path, **changes: Any) -> None:
    """Change values of a journal's state."""
    write_json(journal / _STATE, {**read_state(journal), **changes})


def metric_values(stage: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of nested metrics under their MLflow names, `<stage>/<key>`."""
    return {
        f"{stage}/{key}": float(value)
        for key, value in flatten(metrics, "/").items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def flatten(nested: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Return a nested dict as a flat one, with keys joined by `separator`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            flat.update({f"{key}{separator}{name}": item for name, item in inner.items()})
        else:
            flat[str(key)] = value
    return flat


def now() -> int:
    """Return the current Unix time in milliseconds, MLflow's unit."""
    return time.time_ns() // 1_000_000
