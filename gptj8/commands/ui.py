"""`gptj8 ui`: MLflow's page on the runs of this project.

MLflow's own start takes four server processes and ten more for jobs that judge the answers of
language models, and says a dozen lines about itself. One process is enough for one person, and one
line: where the runs are, once they can be seen.
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
_START_SECONDS = 300.0  # a machine that trains meanwhile
_STOP_SECONDS = 10.0
_ENVIRONMENT = {
    # Jobs for which gptj8 has no use: ten processes.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 ui`."""
    ui = commands.add_parser("ui", help="browse the runs in MLflow")
    ui.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    ui.add_argument("--port", type=int, default=5000, help="default: 5000; 0: one that is free")
    ui.set_defaults(command=_ui)


def _ui(arguments: argparse.Namespace) -> None:
    params = load_params()
    uri = tracking_uri(params)
    if uri.startswith(("http://", "https://")):
        print(f"the runs are kept by a server that has its own page: {without_password(uri)}")
        return
    if uri.startswith(_SQLITE):
        _check_database(Path(uri.removeprefix(_SQLITE)))
    host = arguments.host
    taken = bind(host, arguments.port)
    port = taken[0].getsockname()[1]
    for socket in taken:  # it was free; MLflow takes it itself
        socket.close()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, **_ENVIRONMENT}
        server = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            address = url_of("127.0.0.1" if host == "0.0.0.0" else host, port)
            page = _page(server, address, params.tracking.experiment)
            if page is not None:
                if host not in ("127.0.0.1", "localhost", "::1"):
                    print(f"whoever reaches {host} can change the runs", file=sys.stderr)
                print(f"{params.tracking.experiment}: {page} (Ctrl+C ends it)", flush=True)
                server.wait()
        except KeyboardInterrupt:  # which is how a page is closed
            return
        finally:
            _stop(server)
        said.seek(0)
        lines = [x.strip() for x in said.read().decode(errors="replace").splitlines()]
        telling = [x for x in lines if "error" in x.lower() and "://" not in x]
        last = next(iter([*telling[-1:], *lines[-1:]]), "it says nothing")
        raise UserError(f"MLflow's server does not run: {last}")


def _check_database(file: Path) -> None:
    """Raise UserError for what MLflow would make silently, or try for two minutes to open."""
    if not file.is_file():
        raise UserError(f"no run is recorded yet: {file} does not exist")
    with open(file, "rb") as stream:
        if stream.read(16) not in (b"", b"SQLite format 3\0"):
            raise UserError(f"{file} is not a database")


def _page(server: subprocess.Popen[bytes], address: str, experiment: str) -> str | None:
    """Wait for the server and return where the experiment's runs are; None if it has ended."""
    query = urllib.parse.urlencode({"experiment_name": experiment})
    api = f"{address}/api/2.0/mlflow/experiments/get-by-name?{query}"
    # A proxy of the environment is not for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            with opener.open(api, timeout=10) as response:
                found = json.load(response)["experiment"]
            # Otherwise the page is one for agents and their traces.
            page = f"{address}/#/experiments/{found['experiment_id']}/runs"
            page += "?workflowType=machine_learning"
            has_view = any(tag["key"] == VIEW_TAG for tag in found.get("tags", []))
            return f"{page}&viewStateShareKey={VIEW}" if has_view else page
        except urllib.error.HTTPError:  # it answers, and has no such experiment yet
            return address
        except OSError:
            time.sleep(0.1)
    return None


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and with it the process that it forwards signals to.

    It stays in this process's group, so that a terminal that is closed ends all of them.
    """
    with suppress(KeyboardInterrupt):
        if server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_SECONDS)
    if server.poll() is None:
        server.kill()
