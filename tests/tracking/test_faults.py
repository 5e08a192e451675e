"""Tracking servers that disconnect, hang or fail: the stage continues, and no data is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest

from gptj8.commands.main import main
from gptj8.tracking.journal import journals_folder, journals_of
from gptj8.tracking.stage import stage_run
from tests.helpers.servers import mlflow_server

pytestmark = pytest.mark.slow

STEPS = 40


class Proxy:
    """A proxy between the stage and a real server that can simulate faults.

    Attributes:
        mode: `pass`, `refuse` (connections are closed), `hang` (no response) or `fail` (500).
    """

    def __init__(self, upstream: int) -> None:
        self.mode = "pass"
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def switch(self, mode: str) -> None:
        """Change the mode and, unless it is `pass`, close open connections."""
        self.mode = mode
        if mode != "pass":
            for connection in list(self._open):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self.mode == "refuse":
            client.close()
        elif self.mode == "hang":
            time.sleep(60)
            client.close()
        elif self.mode == "fail":
            with contextlib.suppress(OSError):
                client.recv(65536)
                body = b'{"error_code": "INTERNAL_ERROR", "message": "broken"}'
                head = f"HTTP/1.1 500 Internal Server Error\r\nContent-Length: {len(body)}\r\n"
                client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                client.close()
        else:
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                client.close()
                return
            self._open |= {client, server}
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
            self._pump(client, server)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture
def proxy(project, server, monkeypatch):
    proxy = Proxy(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Each test has its own MLflow experiment.
    (project / "params.yaml").write_text(
        "data: {train: rows.csv}\nmodel: {path: model}\n"
        f"tracking: {{experiment: {project.name}}}\n"
    )
    return proxy


def train(proxy: Proxy, faults: dict[int, str]) -> tuple[float, float]:
    """Record a stage with steps of 0.1 s while the proxy switches modes at the given steps.

    Return the seconds that recording added to the steps, and the seconds that the stage waited at
    its end.
    """
    from gptj8.params.sections import load_params

    folder = Path("reports/finetune")
    waited = 0.0
    with stage_run("finetune", load_params()) as run:
        for step in range(1, STEPS + 1):
            if step in faults:
                proxy.switch(faults[step])
            begun = time.monotonic()
            run.log_metrics({"loss": 1 / step, "tokens_per_second": 100.0}, step)
            waited += time.monotonic() - begun
            time.sleep(0.1)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"eval_loss": 0.25, "steps": STEPS}))
        (folder / "loss.csv").write_text("step,loss\n1,1\n")
        if STEPS + 1 in faults:
            proxy.switch(faults[STEPS + 1])
        ended = time.monotonic()
    return waited, time.monotonic() - ended


def only_run(server: int, name: str):
    client = mlflow.MlflowClient(f"http://127.0.0.1:{server}")
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def assert_complete_once(server: int, name: str) -> None:
    client, run = only_run(server, name)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "finetune/loss")
    assert [(p.step, p.value) for p in history] == [(n, 1 / n) for n in range(1, STEPS + 1)]
    assert run.data.metrics["finetune/eval_loss"] == 0.25
    assert run.data.tags["stage.finetune"] == "ran"
    assert run.data.params["finetune.r"] == "8"
    assert len(client.get_metric_history(run.info.run_id, "finetune/eval_loss")) == 1
    files = {f.path for f in client.list_artifacts(run.info.run_id, "reports/finetune")}
    assert files == {"reports/finetune/loss.csv", "reports/finetune/metrics.json"}


@pytest.mark.parametrize(
    "faults",
    [
        {1: "refuse"},
        {1: "hang"},
        {1: "fail"},
        {STEPS // 2: "refuse"},
        {STEPS // 2: "hang"},
        {STEPS // 2: "fail"},
        {STEPS // 2: "refuse", STEPS // 2 + 5: "fail"},
        {STEPS + 1: "refuse"},
        {STEPS + 1: "hang"},
    ],
    ids=str,
)
def test_sync_completes_run_without_duplicates(proxy, server, project, faults, capsys, monkeypatch):
    waited, ended = train(proxy, faults)
    assert waited < 0.05 * STEPS * 0.1
    assert ended < 10  # 3 s for an unresponsive server, plus delays on a busy machine
    assert "run `gptj8 sync` to send the rest" in capsys.readouterr().err
    proxy.switch("pass")
    monkeypatch.setattr(sys, "argv", ["gptj8", "sync"])
    main()
    assert_complete_once(server, project.name)
    assert not list(journals_folder().glob("*"))
    main()
    assert "nothing to send" in capsys.readouterr().out
    assert_complete_once(server, project.name)


def test_server_that_recovers_during_stage_needs_no_sync(proxy, server, project, capsys):
    train(proxy, {5: "fail", 10: "pass"})
    assert capsys.readouterr().err == ""
    assert_complete_once(server, project.name)


def test_sync_reports_unsent_stages(proxy, project, capsys, monkeypatch):
    train(proxy, {1: "refuse"})
    monkeypatch.setattr(sys, "argv", ["gptj8", "sync"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert f"127.0.0.1:{proxy.port}" in error
    assert "stages not sent: 1 (kept in" in error
    (folder,) = [f for f in journals_folder().glob("*") if f.is_dir()]
    assert len(journals_of(folder)) == 1


KILLED = """
import os, signal, sys, time
from gptj8.tracking.stage import stage_run
from gptj8.params.sections import load_params
with stage_run("finetune", load_params()) as run:
    run.log_metrics({"loss": 1.0}, 1)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_stage_is_marked_as_killed(proxy, server, project):
    subprocess.run([sys.executable, "-c", KILLED, "4"], cwd=project, check=False)
    until = time.monotonic() + 60
    while any(journals_of(folder) for folder in journals_folder().glob("*")):
        assert time.monotonic() < until, "the recorder did not finish"
        time.sleep(0.5)
    _, run = only_run(server, project.name)
    assert run.info.status == "KILLED"
    assert run.data.tags["gptj8.error"] == "the process was killed"
    assert run.data.metrics["finetune/loss"] == 1.0


def lose_power(project: Path) -> None:
    """Kill a stage and its recorder after some data was recorded."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, "60"], cwd=project)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 30
    while not (children.read_text().split() and list(journals_folder().glob("*/*/state.json"))):
        assert time.monotonic() < until
        time.sleep(0.1)
    for pid in [*map(int, children.read_text().split()), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_sync_marks_stage_killed_with_recorder(proxy, server, project, monkeypatch, capsys):
    """No process is left to mark the stage as killed, so sync does it."""
    lose_power(project)
    monkeypatch.setattr(sys, "argv", ["gptj8", "sync"])
    main()
    assert "stages sent: 1\n" in capsys.readouterr().out
    assert only_run(server, project.name)[1].info.status == "KILLED"


TURNS = """
import os, sys, time
from pathlib import Path
from gptj8.tracking.sending import turn
folder, mine = Path(sys.argv[1]), Path(sys.argv[2])
end = time.monotonic() + 4
while time.monotonic() < end:
    with turn(folder):
        os.close(os.open(mine, os.O_CREAT | os.O_EXCL))
        os.remove(mine)
    with turn(folder, wait=False) as held:
        if held:
            os.close(os.open(mine, os.O_CREAT | os.O_EXCL))
            os.remove(mine)
"""


def test_turn_is_exclusive_while_folder_is_recreated(tmp_path):
    command = [sys.executable, "-c", TURNS, tmp_path / "journals" / "key", tmp_path / "mine"]
    processes = [subprocess.Popen(command, env={**os.environ}) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert not (tmp_path / "journals" / "key").exists()


def test_only_one_of_concurrent_syncs_sends(proxy, server, project):
    lose_power(project)
    command = [sys.executable, "-m", "gptj8.commands.main", "sync"]
    syncs = [
        subprocess.Popen(
            command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(3)
    ]
    outputs = [sync.communicate(timeout=120)[0] for sync in syncs]
    assert [sync.returncode for sync in syncs] == [0, 0, 0], outputs
    assert sum("stages sent: 1\n" in text for text in outputs) == 1, outputs
    client, run = only_run(server, project.name)
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "finetune/loss")) == 1
    assert not list(journals_folder().glob("*"))


def test_full_disk_does_not_stop_stage(project, monkeypatch, capsys):
    from gptj8.params.sections import parse_params
    from gptj8.tracking.journal import JournalWriter

    def full(self, event, **content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JournalWriter, "write", full)
    content = {"data": {"train": "rows.csv"}, "model": {"path": "model"}}
    done = []
    with stage_run("finetune", parse_params(content)) as run:
        run.log_metrics({"loss": 1.0}, 1)
        done.append(True)
    assert done
    assert "MLflow does not record this stage" in capsys.readouterr().err
