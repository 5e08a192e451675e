"""Environments of systems that need packages of their own: .gptj8/opponents/NAME.

Each is made with `python -m venv` and pip. Most are layers on top of the project's environment and
see its packages, unless they have another version of their own, so that torch is not installed
again; pip may not choose another version of torch in any of them. An environment that was not
finished, or whose packages have changed, is made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from benchmarks.opponents import OPPONENTS
from benchmarks.opponents.isa import build_variables

FOLDER = Path(".gptj8/opponents")
_DONE = "installed.txt"


class NotInstalled(Exception):
    """An environment cannot be made; the message is one line."""


def python_of(name: str, isa: str = "native", root: Path = FOLDER) -> Path:
    """Return the Python that runs a system; its environment is made if there is none.

    Raises:
        NotInstalled: if pip fails, for example because no package index answers.
    """
    opponent = OPPONENTS[name]
    if not opponent.requires:
        return Path(sys.executable)
    folder = (root / (f"{name}-{isa}" if opponent.is_native else name)).absolute()
    python = folder / "bin" / "python"
    wanted = "\n".join(opponent.requires)
    done = folder / _DONE
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making an environment for {name}: {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    with open(log, "wb") as output:
        _run(output, log, sys.executable, "-m", "venv", folder)
        if opponent.is_layered:
            _see_project(folder)
        constraints = folder / "constraints.txt"
        constraints.write_text(f"torch=={version('torch').partition('+')[0]}\n", encoding="utf-8")
        command = (python, "-m", "pip", "install", "-c", constraints, *opponent.requires)
        _run(output, log, *command, **(build_variables(isa) if opponent.is_native else {}))
        if opponent.unwanted:
            _run(output, log, python, "-m", "pip", "uninstall", "--yes", *opponent.unwanted)
    done.write_text(wanted, encoding="utf-8")
    return python


def _run(output: object, log: Path, *command: object, **settings: str) -> None:
    words = [str(word) for word in command]
    environment = {**os.environ, **settings}
    done = subprocess.run(words, stdout=output, stderr=output, env=environment)  # type: ignore
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.strip() for line in lines if "error" in line.lower()]
        reason = (errors or lines or ["no output"])[-1][:150]
        raise NotInstalled(f"{reason} (see {log})")


def _see_project(folder: Path) -> None:
    """Let an environment see the packages of the project's environment, after its own."""
    (own,) = folder.glob("lib/python*/site-packages")
    project = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (own / "project.pth").write_text("\n".join(sorted(project)) + "\n", encoding="utf-8")
