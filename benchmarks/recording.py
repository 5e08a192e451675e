"""Measure the cost of recording, with a server that works, is unreachable, hangs or fails.

python -m benchmarks.recording [ROUNDS] [--epochs 0.5] [--places PLACE ...]    after `make repro`

Trains the adapter of the default project without recording, then with MLflow in a local database,
on a working server on loopback, and on servers that are unreachable, never respond, and return 500.
The variants alternate in rounds, so that other load on the machine affects all of them equally.
Prints the median seconds of the training steps and of the complete stage, and their ratios to the
training without recording.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

_PROJECT = Path.cwd()
_INPUTS = ("artifacts/dataset", "artifacts/base-8bit")
_FAILURE = b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--places", nargs="+", help="rows to measure in addition to the first")
    arguments = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="gptj8-recording-") as name,
        _servers(Path(name)) as uri,
    ):
        places = uri if arguments.places is None else ("not recorded", *arguments.places)
        for number in range(arguments.rounds):
            for place in places:
                folder = Path(name) / f"{number}-{place.replace(' ', '-')}"
                times.setdefault(place, []).append(_train(folder, uri[place], arguments.epochs))
                print(f"round {number + 1}: {place} {times[place][-1]}", file=sys.stderr)
    steps = {place: statistics.median(t[0] for t in seconds) for place, seconds in times.items()}
    whole = {place: statistics.median(t[1] for t in seconds) for place, seconds in times.items()}
    print("| place | steps, s | ratio | stage, s | ratio |\n|---|---|---|---|---|")
    for place in times:
        print(
            f"| {place} | {steps[place]:.1f} | {steps[place] / steps['not recorded']:.3f} "
            f"| {whole[place]:.1f} | {whole[place] / whole['not recorded']:.3f} |"
        )


def _train(folder: Path, address: str | None, epochs: float) -> tuple[float, float]:
    """Train in a new folder; return the seconds of the steps and of the stage."""
    params = YAML(typ="safe").load((_PROJECT / "params.yaml").read_text(encoding="utf-8"))
    params["finetune"] |= {"num_train_epochs": epochs, "logging_steps": 1, "eval_steps": 1000}
    params["finetune"]["max_eval_samples"] = 20
    params["tracking"]["uri"] = address
    (folder / "artifacts").mkdir(parents=True)
    for path in (params["data"]["train"], params["model"]["path"]):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(_PROJECT / path)
    (folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")  # JSON is YAML
    for path in _INPUTS:
        (folder / path).symlink_to(_PROJECT / path)
    environment = {**os.environ, "PYTHONPATH": str(_PROJECT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "stages.finetune"],
        cwd=folder, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    whole = time.perf_counter() - started
    metrics = json.loads((folder / "reports/finetune/metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder / "artifacts")
    return metrics["seconds"], whole


@contextlib.contextmanager
def _servers(folder: Path) -> Iterator[dict[str, str | None]]:
    """Start the servers; yield display name -> tracking URI (None: not recorded)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "served")]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1),
            ):
                break
            if server.poll() is not None:
                sys.exit(f"error: the server did not start, see {folder / 'server.log'}")
            time.sleep(0.2)
        yield {
            "not recorded": None,
            "local database": "sqlite:///mlflow.db",
            "server": f"http://127.0.0.1:{port}",
            "server unreachable": "http://127.0.0.1:9",
            "server hangs": f"http://127.0.0.1:{_answer(b'')}",
            "server returns 500": f"http://127.0.0.1:{_answer(_FAILURE)}",
        }
    finally:
        server.terminate()
        server.wait()


def _answer(content: bytes) -> int:
    """Listen on loopback, send `content` to every client and return the port.

    Clients get no response if `content` is empty.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            if not content:
                time.sleep(3600)
            connection.sendall(content)

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


if __name__ == "__main__":
    main()
