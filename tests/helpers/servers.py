"""Local servers: a free port, and an MLflow tracking server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(folder: Path, *options: str, environment: dict[str, str] | None = None):
    """Start an MLflow server on the loopback interface and yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=folder,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            until = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.2)
            yield port
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
