"""`gptj8 sync` and `gptj8 find` with servers that are away, refuse, or lack the experiment."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gptj8.commands.main import main
from tests.helpers.servers import free_port
from tests.helpers.tracked_project import report


class Refusing(BaseHTTPRequestHandler):
    """Answer every request as a server does that does not know the user."""

    def do_GET(self) -> None:
        body = b'{"error_code": "PERMISSION_DENIED", "message": "not for you"}'
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def refusing():
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def complete(project, monkeypatch):
    """A project whose results are in place and up to date, so `sync` looks for their row."""
    (project / "params.yaml").write_text("data: {train: rows.csv}\nmodel: {path: model}\n")
    (project / "dvc.yaml").write_text("stages: {}\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    report("validate", rows=1)
    return project


def error_of(monkeypatch, capsys, *arguments: str) -> str:
    """Run a command that must fail with one line and exit code 2; return the line."""
    monkeypatch.setattr(sys, "argv", ["gptj8", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("command", ["sync", "find"])
def test_server_that_is_away_is_one_line(complete, monkeypatch, capsys, command):
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    line = error_of(monkeypatch, capsys, command)
    assert line.startswith(f"error: {uri} does not respond: ")


@pytest.mark.parametrize("command", ["sync", "find"])
def test_server_that_refuses_is_not_said_to_be_away(
    complete, refusing, monkeypatch, capsys, command
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing)
    line = error_of(monkeypatch, capsys, command)
    assert line.startswith(f"error: {refusing} responds with an error: ")
    assert "not for you" in line and "does not respond" not in line
