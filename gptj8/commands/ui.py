"""`gptj8 ui`: open MLflow's web page for the runs of this project.

By default MLflow starts four server processes and ten processes for jobs that evaluate language
models, and prints a dozen lines. This command starts one process and prints one line with the
address once the page is available.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.serving.sockets import bind, url_of
from gptj8.tracking.identity import tracking_uri, without_password
from gptj8.tracking.page import VIEW, VIEW_TAG

_SQLITE = "sqlite:///"
_START_SECONDS = 300.0  # enough for a machine that is training a model
_STOP_SECONDS = 10.0
_ENVIRONMENT = {
    # gptj8 does not use these jobs, which take ten processes.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 ui`."""
    ui = commands.add_parser("ui", help="browse the runs in MLflow")
    ui.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    ui.add_argument("--port", type=int, default=5000, help="0: any free port (default: 5000)")
    ui.set_defaults(command=_ui)


def _ui(arguments: argparse.Namespace) -> None:
    params = load_params()
    uri = tracking_uri(params)
    if uri.startswith(("http://", "https://")):
        print(f"the runs are on a tracking server; open {without_password(uri)}")
        return
    if uri.startswith(_SQLITE):
        _check_database(Path(uri.removeprefix(_SQLITE)))
    host = arguments.host
    taken = bind(host, arguments.port)
    port = taken[0].getsockname()[1]
    for socket in taken:  # the port is free; MLflow binds it itself
        socket.close()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, **_ENVIRONMENT}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            address = url_of("127.0.0.1" if host == "0.0.0.0" else host, port)
            page = _page(server, address, params.tracking.experiment)
            if page is not None:
                if host not in ("127.0.0.1", "localhost", "::1"):
                    print(
                        f"warning: anyone who can reach {host} can change the runs",
                        file=sys.stderr,
                    )
                print(f"{params.tracking.experiment}: {page} (press Ctrl+C to stop)", flush=True)
                server.wait()
        except KeyboardInterrupt:  # the usual way to stop the server
            return
        finally:
            _stop(server)
        log.seek(0)
        lines = [x.strip() for x in log.read().decode(errors="replace").splitlines()]
        errors = [x for x in lines if "error" in x.lower() and "://" not in x]
        last = next(iter([*errors[-1:], *lines[-1:]]), "it printed no message")
        raise UserError(f"the MLflow server failed: {last}")


def _check_database(file: Path) -> None:
    """Check that the database exists and is SQLite.

    MLflow would silently create a missing file and retry for two minutes to open an invalid one.

    Raises:
        UserError: if the file is missing or is not an SQLite database.
    """
    if not file.is_file():
        raise UserError(f"no run is recorded yet: {file} does not exist")
    with open(file, "rb") as stream:
        if stream.read(16) not in (b"", b"SQLite format 3\0"):
            raise UserError(f"{file} is not a database")


def _page(server: subprocess.Popen[bytes], address: str, experiment: str) -> str | None:
    """Wait for the server and return the URL of the experiment's runs, or None if it has exited."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    api = f"{address}/api/2.0/mlflow/experiments/get-by-name?{query}"
    # Ignore proxies set in the environment: the server is local.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            with opener.open(api, timeout=10) as response:
                found = json.load(response)["experiment"]
            # Without workflowType MLflow shows its page for agent traces.
            page = f"{address}/#/experiments/{found['experiment_id']}/runs"
            page += "?workflowType=machine_learning"
            has_view = any(tag["key"] == VIEW_TAG for tag in found.get("tags", []))
            return f"{page}&viewStateShareKey={VIEW}" if has_view else page
        except urllib.error.HTTPError:  # the server is up, but the experiment does not exist yet
            return address
        except OSError:
            time.sleep(0.1)
    return None


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and the process that it forwards signals to.

    They stay in this process's group, so that closing the terminal stops all of them.
    """
    with suppress(KeyboardInterrupt):
        if server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_SECONDS)
    if server.poll() is None:
        server.kill()
