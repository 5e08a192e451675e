"""Record a stage: `with stage_run("finetune", params) as record`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from gptj8.params.sections import Params, resolved
from gptj8.runtime.distributed import is_main_process
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.tracking.identity import (
    experiment_name,
    identify,
    is_recorded,
    sweep_name,
    tracking_uri,
    without_password,
    workspace_id,
)
from gptj8.tracking.journal import JournalWriter, metric_values, read_state
from gptj8.tracking.recorder import start_recorder
from gptj8.tracking.stage_results import (
    failure_events,
    remember_that_it_ran,
    stage_events,
    stage_is_recordable,
)

_PARAM_LENGTH = 6000  # MLflow's limit for one value
_SILENCE_SECONDS = {True: 20.0, False: 3.0}
"""How long a stage waits at its end for a recorder that makes no progress, by whether the database
is local: creating one takes time, but an unresponsive server must not delay the stage."""


class StageRun:
    """The MLflow run of an experiment during one stage; created by `stage_run`.

    Data is written to a local journal, which another process sends. Except for `open_run`, no
    method waits for the server or raises if it is unreachable.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._journal: JournalWriter | None = None
        self._recorder: subprocess.Popen[bytes] | None = None
        self._uri = ""
        self._experiment = ""
        self._last_step = 0
        self._has_no_row_yet = False
        self._is_sent = False

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers as `<stage>/<key>`; keys of nested dicts are joined with `/`."""
        self._last_step = max(self._last_step, step or 0)
        self._write("metrics", step=step or 0, values=metric_values(self.stage, metrics))

    def open_run(self) -> tuple[Any, str]:
        """Return an MLflow client and the run's id, once the recorder has found or created the run.

        Raises:
            UserError: if this stage is not recorded, or the server does not respond.
        """
        from gptj8.tracking.delivery import connect

        run_id = self._run_id()
        client, _, _ = connect(self._uri, self._experiment)
        return client, run_id

    def outcome(self) -> str:
        """Return, after the stage has ended, a line about whether its run is complete."""
        if not self._uri:
            return "this stage is not recorded"
        where = without_password(self._uri)
        return (
            f"the run is complete in {where}"
            if self._is_sent
            else f"some results have not reached {where} yet"
        )

    def _start(self, params: Params) -> None:
        if not is_recorded(params):
            return
        try:
            identity = identify(params)
            if identity is None:
                # DVC may convert a model before it has prepared the dataset. The experiment has no
                # key until both exist, so later stages record the results of this one.
                self._has_no_row_yet = True
                return
            self._uri, self._experiment = tracking_uri(params), params.tracking.experiment
            journal = JournalWriter.begin(identity.key, self.stage)
            journal.write(
                "start",
                key=identity.key,
                recipe=identity.recipe,
                workspace=workspace_id(),
                stage=self.stage,
                name=experiment_name(params),
                sweep=sweep_name(),
                uri=without_password(self._uri),
                experiment=self._experiment,
                params=_flat_params(params),
                tags=identity.tags,
            )
        except OSError as error:
            self._give_up(error)
            return
        self._journal = journal
        self._recorder = start_recorder(journal.folder)

    def _finish(self, status: str, error: str | None = None) -> None:
        if self._has_no_row_yet and status == "FINISHED":
            remember_that_it_ran(self.stage)
        if self._journal is None:
            return
        try:
            if status != "FINISHED":
                for event in failure_events(self.stage, self._journal):
                    self._write(**event)
            elif stage_is_recordable(self.stage):
                events = stage_events(self.stage, self._journal, replay=False, step=self._last_step)
                self._write("stage", stage=self.stage, earlier=False, origin="ran", events=events)
        except OSError as failure:
            self._give_up(failure)
            return
        self._write("end", status=status, error=error)
        if self._journal is not None:
            self._journal.close()
            self._wait_for_recorder()

    def _wait_for_recorder(self) -> None:
        """Wait until the recorder has sent the journal, fails or makes no progress."""
        journal = self._journal
        assert journal is not None
        limit = _SILENCE_SECONDS[self._uri.startswith("sqlite:")]
        state: dict[str, Any] = {}
        heard = time.monotonic()
        while self._recorder is not None and self._recorder.poll() is None:
            latest = read_state(journal.folder)
            if latest != state:
                state, heard = latest, time.monotonic()
            if state.get("phase") in ("done", "trouble") or time.monotonic() - heard > limit:
                break
            time.sleep(0.02)
        state = read_state(journal.folder)
        if self._recorder is not None and self._recorder.stdin is not None:
            with suppress(OSError):
                self._recorder.stdin.close()
        for notice in state.get("notices", []):
            _warn(notice)
        self._is_sent = state.get("phase") == "done"
        if not self._is_sent:
            reason = state.get("reason") or self._why_not_sent(state)
            _warn(
                f"MLflow has not received all of {self.stage} yet ({reason}); no data is lost; run "
                "`gptj8 sync` to send the rest"
            )

    def _why_not_sent(self, state: Mapping[str, Any]) -> str:
        """Return why a recorder that reported no error has not sent the journal."""
        if self._recorder is None:
            return "the process that sends it could not be started"
        if self._recorder.poll() is not None:
            return "the process that sends it ended early"
        if state.get("phase") in ("connecting", "sending"):
            return f"{without_password(self._uri)} does not respond"
        return "the process that sends it is busy with earlier stages, or still starting"

    def _run_id(self) -> str:
        """Return the id of the run once the recorder has found or created it."""
        if self._journal is None:
            raise UserError("this stage is not recorded")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            state = read_state(self._journal.folder)
            if state.get("run_id"):
                return str(state["run_id"])
            if state.get("phase") == "trouble":
                raise UserError(state["reason"])
            time.sleep(0.05)
        raise UserError(self._why_not_sent(read_state(self._journal.folder)))

    def _write(self, event: str, **content: Any) -> None:
        if self._journal is None:
            return
        try:
            self._journal.write(event, **content)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._journal = None
        _warn(f"MLflow does not record this stage: {one_line(error)}")


@contextmanager
def stage_run(stage: str, params: Params) -> Iterator[StageRun]:
    """Record one stage of the experiment described by `params`.

    The run is marked as running at the start and as finished, failed or killed at the end. The
    contents of `reports/<stage>` become metrics and artifacts of the run. So do the reports of
    earlier stages that DVC restored from its cache.
    """
    run = StageRun(stage)
    if is_main_process():  # in distributed training, only one process records
        run._start(params)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        run._finish("KILLED", "interrupted")
        raise
    except BaseException as error:
        run._finish("FAILED", f"{stage}: {one_line(error)}")
        raise
    run._finish("FINISHED")


def _flat_params(params: Params) -> dict[str, str]:
    flat: dict[str, Any] = {}
    for name, section in resolved(params).items():
        if isinstance(section, dict):
            flat |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            flat[name] = section
    texts = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in flat.items())
    return {key: text[:_PARAM_LENGTH] for key, text in texts}


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
