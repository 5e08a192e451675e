"""Start the process of a system and ask it for measurements."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.opponents.server import Options

_MODULE = "benchmarks.opponents.server"


class Failed(Exception):
    """A system failed, or took too long; the message is one line."""


class Client:
    """A running system, see `benchmarks.opponents.server`.

    Attributes:
        about: what the system says about itself.
    """

    def __init__(
        self,
        python: Path,
        options: Options,
        environment: Mapping[str, str],
        seconds: float,
    ) -> None:
        """Start the system and wait until its model is loaded.

        Args:
            python: Python of the system's environment.
            options: what to load.
            environment: environment variables.
            seconds: limit for loading.

        Raises:
            Failed: if the process ends, or is not ready in time.
        """
        options.folder.mkdir(parents=True, exist_ok=True)
        self._log = options.folder / "log.txt"
        self._end = ""  # why it was stopped
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", _MODULE, options.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(environment),
            )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.about: dict[str, str] = self._next(seconds)["about"]

    def ask(self, command: str, seconds: float) -> float | None:
        """Return the answer to a command.

        Raises:
            Failed: if the system reports an error, ends, or takes longer than `seconds`. It is
                stopped if it takes too long, and then fails every later command.
        """
        assert self._process.stdin is not None
        if self._end:
            raise Failed(f"stopped: {self._end}")
        try:
            print(command, file=self._process.stdin, flush=True)
        except (OSError, ValueError):
            raise Failed(self._last_words()) from None
        answer = self._next(seconds)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                assert stream is not None
                stream.close()
            except OSError:  # a command that was never read
                pass

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._end = f"more than {seconds:g} s"
        else:
            if line is not None:
                return json.loads(line)
            self._end = self._last_words()
        self.close()
        raise Failed(self._end)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._answers.put(line)
        except ValueError:  # closed meanwhile
            pass
        self._answers.put(None)

    def _last_words(self) -> str:
        return last_line(self._log) or f"exit code {self._process.poll()}"


def convert(
    python: Path, options: Options, environment: Mapping[str, str], seconds: float
) -> float:
    """Convert the model to a system's format; return the seconds, without those of imports.

    Raises:
        Failed: if it fails or takes too long.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "conversion.txt"
    command = [str(python), "-m", _MODULE, options.to_json(), "convert"]
    try:
        with open(log, "wb") as errors:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, env=dict(environment),
                text=True, timeout=seconds,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"more than {seconds:g} s for the conversion") from None
    if done.returncode:
        raise Failed(last_line(log) or f"exit code {done.returncode}")
    return json.loads(done.stdout)["value"]


def last_line(file: Path) -> str:
    """Return the last line of a log, at most 200 characters."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
