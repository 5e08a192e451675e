"""The recorder: a process that sends a stage's journal to MLflow while the stage runs.

Because it is a separate process, a server that is unreachable, hangs or returns invalid responses
can neither slow nor stop the stage, and a killed stage is still marked as killed. The recorder
detects the end of the stage by its standard input, which closes when the stage exits.

python -m gptj8.tracking JOURNAL FOLDER     (started by `gptj8.tracking.stage.stage_run`)
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptj8.runtime.dvc_digests import cache_folder
from gptj8.runtime.messages import one_line
from gptj8.runtime.process import set_defaults
from gptj8.runtime.project import project_root
from gptj8.tracking.journal import (
    EVENTS,
    JournalWriter,
    end_if_killed,
    is_alive,
    journals_folder,
    journals_of,
    now,
    read_events,
    share_with_cache,
    update_state,
)
from gptj8.tracking.lineage import changes, libraries, lineage_tags, unknown_files
from gptj8.tracking.stage_results import ANCESTORS, origin, stage_events, stage_is_recordable

_POLL_SECONDS = 0.5
_SAMPLE_SECONDS = 10.0
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)
_LINGER_SECONDS = 30.0
"""How long the recorder retries an unreachable server after the stage has ended."""
_LOG = "recorder.log"


def start_recorder(journal: Path) -> subprocess.Popen[bytes] | None:
    """Start the recorder of a journal that has its first event; return None if that fails.

    The recorder gets its own session, so that Ctrl+C stops only the stage and the recorder can
    still record how the stage ended.
    """
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "gptj8.tracking", str(journal), str(Path.cwd())]
    try:
        with open(journal / _LOG, "ab") as log:
            return subprocess.Popen(
                command,
                cwd=project_root(),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError:
        return None


def main() -> None:
    """Record one stage; see the module docstring."""
    set_defaults()
    with suppress(OSError):
        os.nice(5)  # give priority to the stage
    journal, folder = Path(sys.argv[1]), Path(sys.argv[2])
    describe(journal, folder)
    _Recorder(journal).run()


def describe(journal: Path, folder: Path) -> None:
    """Write the origin of the stage and the results of earlier stages to the journal.

    This is done here to save the stage's time, and before slow imports, because DVC deletes the
    folder of a queued experiment soon after its last stage.
    """
    stage = read_events(journal)[0][0]["stage"]
    writer = JournalWriter(journal)
    try:
        writer.write("tags", tags=lineage_tags(folder))
        texts = {
            "requirements.txt": libraries(),
            "changes.diff": changes(folder),
            "not_in_git.txt": unknown_files(folder),
        }
        for name, content in texts.items():
            if content:
                (journal / name).write_bytes(content.encode(errors="surrogateescape"))
                writer.write("artifact", file=name, folder="lineage")
        for earlier in ANCESTORS[stage]:
            if stage_is_recordable(earlier, folder):
                events = stage_events(earlier, writer, replay=True, root=folder)
                how = origin(earlier, folder)
                writer.write("stage", stage=earlier, earlier=True, origin=how, events=events)
    finally:
        writer.close()


class _Recorder:
    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._writer = JournalWriter(journal)
        self._stage_is_running = True
        self._ended_at = 0.0
        self._sampler: _SystemMetrics | None = None
        self._is_sampled = True

    def run(self) -> None:
        self._set_phase("starting")
        self._free_disk_space()
        from gptj8.tracking import sending

        failures = 0
        with sending.turn(self.journal.parent):
            # Journals of earlier stages that could not be sent.
            before = [j for j in journals_of(self.journal.parent) if j < self.journal]
            while True:
                try:
                    if before:
                        self._set_phase("earlier stages")
                    while before:
                        if not is_alive(before[0]):
                            sending.send(before[0])
                        del before[0]
                    self._set_phase("connecting")
                    delivery = sending.open_delivery(self.journal)
                    while not delivery.advance():
                        failures = 0
                        self._watch(_POLL_SECONDS)
                    sending.finish(self.journal, delivery)
                    self._watch_until_stage_exits()
                    sending.discard(self.journal)
                    return
                except Exception as error:  # the stage continues, and the journal is kept
                    reason = sending.explain_failure(self.journal, error)
                    print(f"{time.strftime('%H:%M:%S')} {reason}", flush=True)
                    self._set_phase("trouble", reason=reason)
                pause = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
                failures += 1
                self._watch(pause)
                if self._ended_at and time.monotonic() - self._ended_at > _LINGER_SECONDS:
                    return

    def _free_disk_space(self) -> None:
        try:
            if len(list(journals_folder().glob(f"*/*/{EVENTS}"))) > 1:  # more than this one
                share_with_cache(cache_folder(project_root()))
        except Exception as error:  # recording works without it
            print(f"journals are not shared with DVC's cache: {one_line(error)}", flush=True)

    def _watch_until_stage_exits(self) -> None:
        """Wait for the stage, which reads the journal's state just before it exits."""
        until = time.monotonic() + _LINGER_SECONDS
        while self._stage_is_running and time.monotonic() < until:
            self._check_stage(_POLL_SECONDS)

    def _set_phase(self, phase: str, reason: str = "") -> None:
        update_state(self.journal, phase=phase, reason=reason)

    def _watch(self, seconds: float) -> None:
        """Wait; meanwhile sample system metrics and check whether the stage is still running."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self._stage_is_running:
                time.sleep(left)
                return
            self._sample()
            self._check_stage(min(left, _POLL_SECONDS))

    def _sample(self) -> None:
        if not self._is_sampled:
            return
        try:
            if self._sampler is None:
                self._sampler = _SystemMetrics(self._writer)
            self._sampler.sample()
        except Exception as error:  # system metrics are optional; the rest is still recorded
            self._is_sampled = False
            print(f"no system metrics: {one_line(error)}", flush=True)

    def _check_stage(self, seconds: float) -> None:
        """Wait for the stage to exit; mark it as killed if it wrote no end event."""
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        if readable and not os.read(sys.stdin.fileno(), 1):
            self._stage_is_running, self._ended_at = False, time.monotonic()
            end_if_killed(self.journal, now())


class _SystemMetrics:
    """Metrics of CPU, memory, disk, network and GPU, measured by MLflow's monitors."""

    def __init__(self, writer: JournalWriter) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._writer = writer
        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # no NVIDIA GPU, or its library is not installed
            self._monitors.append(GPUMonitor())
        self._next = 0.0

    def sample(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SAMPLE_SECONDS
        values: dict[str, Any] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        # Use the time as the step, so that points of all stages of an experiment are in order.
        step = int(time.time())
        self._writer.write(
            "metrics", step=step, values={f"system/{key}": float(v) for key, v in values.items()}
        )
