"""Journals sent to the servers that they were meant for, by recorders and by `gptj8 sync`."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.tracking.delivery import Delivery, connect
from gptj8.tracking.identity import artifact_location, tracking_uri, without_password
from gptj8.tracking.journal import (
    EVENTS,
    end_if_killed,
    is_alive,
    journals_folder,
    journals_of,
    read_events,
    read_state,
    update_state,
)


class Sent(NamedTuple):
    """What `send_all` did.

    Attributes:
        stages: of how many stages the record was sent.
        busy: of how many it is being written or sent by another process.
        failed: server -> what it said, where something could not be sent.
        notices: a line for each thing that a server refused.
    """

    stages: int
    busy: int
    failed: dict[str, str]
    notices: list[str]


def open_delivery(journal: Path) -> Delivery:
    """Connect to the server of a journal, whose first event names it."""
    start = read_events(journal)[0][0]
    uri = _with_password(start["uri"])
    client, experiment_id, location = connect(uri, start["experiment"])
    expected = artifact_location(uri)
    if expected and location != expected and location.endswith("/mlartifacts"):
        notice = (
            f"the runs of {start['experiment']} keep their artifacts in {location}, where this "
            "project was when they began; set tracking.experiment to another name to keep them here"
        )
        update_state(journal, notices=[notice])
    return Delivery(journal, client, experiment_id)


def finish(journal: Path, delivery: Delivery) -> None:
    """Mark a journal as sent; what it holds is not needed any more."""
    refused = [f"MLflow refused {line}" for line in delivery.rejected]
    notices = [*read_state(journal).get("notices", []), *refused]
    update_state(journal, phase="done", notices=notices)


def discard(journal: Path) -> None:
    """Remove a journal; the experiment's folder goes with its last one, when its turn ends."""
    shutil.rmtree(journal, ignore_errors=True)


def send(journal: Path) -> list[str]:
    """Send the journal of a stage that is gone, and return what was refused.

    Raises:
        Exception: of mlflow or the network; the journal stays.
    """
    if read_state(journal).get("phase") != "done":
        end_if_killed(journal, int((journal / EVENTS).stat().st_mtime * 1000))
        delivery = open_delivery(journal)
        delivery.advance()
        finish(journal, delivery)
    notices = read_state(journal).get("notices", [])
    discard(journal)
    return notices


def send_all() -> Sent:
    """Send every journal of the project that no running stage writes and no recorder sends."""
    stages, busy, failed, notices = 0, 0, {}, []
    for folder in sorted(journals_folder().glob("*")):
        if not folder.is_dir():
            continue
        # The recorder of a stage that has ended gives its turn back within a minute.
        running = any(map(is_alive, journals_of(folder)))
        with turn(folder, wait=not running) as mine:
            for journal in journals_of(folder):
                if not mine or is_alive(journal):
                    busy += 1
                    continue
                start = next(iter(read_events(journal)[0]), None)
                if start is None:  # killed before its first line was written
                    discard(journal)
                    continue
                if start["uri"] in failed:
                    continue  # known to be away: the next one would wait in vain as well
                try:
                    notices += send(journal)
                    stages += 1
                except Exception as error:
                    failed[start["uri"]] = one_line(error)
    return Sent(stages, busy, failed, notices)


@contextmanager
def turn(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an experiment's journals; yield whether it could be had without waiting, if asked so."""
    held = _locked(folder / "turn.lock", wait)
    if held is None:
        yield False
        return
    with held:
        try:
            yield True
        finally:
            with suppress(OSError):  # another journal is there, or begins
                if not journals_of(folder):
                    (folder / "turn.lock").unlink()
                    folder.rmdir()


def _locked(file: Path, wait: bool) -> ExitStack | None:
    """Lock a file that whoever has it may remove with its folder; return what unlocks it, None if
    another process has it and is not waited for."""
    while True:
        if file.parent.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(file.parent))
        # Both say that the folder was removed at this very moment.
        with ExitStack() as attempt, suppress(FileNotFoundError, FileExistsError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = attempt.enter_context(open(file, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            if os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
                return attempt.pop_all()


def _with_password(uri: str) -> str:
    """Return the address with the password that the environment or params.yaml has for it."""
    candidates = [os.environ.get("MLFLOW_TRACKING_URI", "")]
    with suppress(UserError):
        candidates.append(tracking_uri(load_params()))
    return next((known for known in candidates if without_password(known) == uri), uri)
