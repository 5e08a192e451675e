"""A PostgreSQL server on the loopback interface, in a temporary folder of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.servers import free_port

_USER = "gptj8"
_ACCOUNTS = ("postgres", "nobody")
"""PostgreSQL refuses to run as root; one of these exists on every system that packages it."""


def _programs() -> tuple[str, str]:
    """Return `initdb` and `postgres`; skip the test if PostgreSQL is not installed."""
    folders = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"))[::-1]]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    found = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if None in found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return found


def _account() -> str | None:
    """Return the account to run as, if this process is root."""
    if os.geteuid():
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in _ACCOUNTS if name in known)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server and yield the SQLAlchemy URI of an empty database."""
    initdb, postgres = _programs()
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="gptj8-postgres-"))
    if account:
        shutil.chown(folder, account)
    data, port = folder / "data", free_port()
    options = {"user": account, "cwd": folder}
    create = [initdb, "--pgdata", data, "--username", _USER, "--auth", "trust", "--no-sync"]
    subprocess.run(create, check=True, capture_output=True, **options)
    command = [postgres, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, **options)
    try:
        _wait(server, port, folder / "log")
        yield f"postgresql+psycopg2://{_USER}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM would wait for clients to disconnect
        server.wait(60)
        shutil.rmtree(folder)


def _wait(server: subprocess.Popen, port: int, log: Path) -> None:
    import psycopg2

    until = time.monotonic() + 60
    while True:
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user=_USER, dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, "PostgreSQL did not start"
            time.sleep(0.1)
