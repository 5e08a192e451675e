"""Send journals to their servers; used by recorders and by `gptj8 sync`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.runtime.locks import locked
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
from gptj8.tracking.server_errors import explain


class Sent(NamedTuple):
    """Result of `send_all`.

    Attributes:
        stages: number of journals that were sent; each belongs to one stage.
        busy: number of journals that another process is writing or sending.
        failed: server -> error message, for servers to which sending failed.
        notices: one line per problem, such as an event that a server rejected.
    """

    stages: int
    busy: int
    failed: dict[str, str]
    notices: list[str]


def open_delivery(journal: Path) -> Delivery:
    """Connect to the server named in the first event of a journal."""
    start = read_events(journal)[0][0]
    uri = _with_password(start["uri"])
    client, experiment_id, location = connect(uri, start["experiment"])
    expected = artifact_location(uri)
    if expected and location != expected and location.endswith("/mlartifacts"):
        notice = (
            f"the artifacts of experiment {start['experiment']} are stored in {location}, the "
            "project's earlier location; set tracking.experiment to another name to store them here"
        )
        update_state(journal, notices=[notice])
    return Delivery(journal, client, experiment_id)


def explain_failure(journal: Path, error: Exception) -> str:
    """Return in one line why a journal could not be sent."""
    if isinstance(error, MlflowException):
        return explain(read_events(journal)[0][0]["uri"], error)
    return one_line(error)


def finish(journal: Path, delivery: Delivery) -> None:
    """Mark a journal as sent, so that it can be removed."""
    rejected = [f"MLflow rejected {line}" for line in delivery.rejected]
    notices = [*read_state(journal).get("notices", []), *rejected]
    update_state(journal, phase="done", notices=notices)


def discard(journal: Path) -> None:
    """Remove a journal; `turn` removes the experiment's folder once it has no more journals."""
    shutil.rmtree(journal, ignore_errors=True)


def send(journal: Path) -> list[str]:
    """Send the journal of a stage that has stopped, and return the notices.

    Raises:
        Exception: an error of mlflow or the network; the journal is kept.
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
    """Send all journals of the project that no other process is writing or sending."""
    stages, busy, failed, notices = 0, 0, {}, []
    for folder in sorted(journals_folder().glob("*")):
        if not folder.is_dir():
            continue
        # The recorder of a stage that has ended releases the lock within a minute.
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
                    continue  # do not wait for an unreachable server again
                try:
                    notices += send(journal)
                    stages += 1
                except Exception as error:
                    failed[start["uri"]] = explain_failure(journal, error)
    return Sent(stages, busy, failed, notices)


@contextmanager
def turn(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Lock an experiment's journals; yield False if another process has the lock.

    Args:
        folder: folder of the experiment.
        wait: wait for the lock; it is then always acquired.
    """
    with locked(folder / "turn.lock", wait) as held:
        yield held
    with suppress(OSError):  # it has journals, or another process has created it again
        if held:
            folder.rmdir()


def _with_password(uri: str) -> str:
    """Return the URI with the password from the environment or params.yaml, if there is one."""
    candidates = [os.environ.get("MLFLOW_TRACKING_URI", "")]
    with suppress(UserError):
        candidates.append(tracking_uri(load_params()))
    return next((known for known in candidates if without_password(known) == uri), uri)
