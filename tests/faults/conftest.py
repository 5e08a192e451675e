"""Fixtures for fault tests, and a summary table of all injected faults."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage_project import StageProject, build_shim
from tests.helpers.project_clone import STAGES

_TRIALS: Counter[str] = Counter()
_SURVIVED: Counter[str] = Counter()


@pytest.fixture(scope="session")
def tally() -> Callable[[str, bool], None]:
    """Count one fault of a kind, and whether it was survived."""

    def count(fault: str, survived: bool) -> None:
        _TRIALS[fault] += 1
        _SURVIVED[fault] += survived

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TRIALS:
        terminalreporter.write_line("")
        terminalreporter.write_line("| fault | trials | survived |")
        terminalreporter.write_line("|---|---|---|")
        for fault, trials in _TRIALS.items():
            terminalreporter.write_line(f"| {fault} | {trials:,} | {_SURVIVED[fault]:,} |")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> StageProject:
    """A project in which every stage ran without faults. Tests must not change it."""
    project = StageProject(tmp_path_factory.mktemp("reference") / "project", tiny_model_dir)
    project.run_all()
    return project


@pytest.fixture(scope="session")
def changes(
    tmp_path_factory: pytest.TempPathFactory, reference: StageProject, shim: Path
) -> Callable[[str], list[str]]:
    """Return the file changes of a stage in order: `rename /path`, `write /path` ..."""
    known: dict[str, list[str]] = {}
    folder = tmp_path_factory.mktemp("changes")

    def of(stage: str) -> list[str]:
        assert stage in STAGES
        if stage not in known:
            project = reference.copy(folder / stage)
            log = folder / f"{stage}.log"
            process = project.run(stage, **faults(shim, project, stage, "count", log=log))
            assert process.returncode == 0, process.stderr
            known[stage] = log.read_text().splitlines()
        return known[stage]

    return of


def faults(
    shim: Path,
    project: StageProject,
    stage: str,
    mode: str,
    at: int = 0,
    error: int = errno.ENOSPC,
    log: Path | None = None,
) -> dict[str, str]:
    """Return environment variables that inject a fault at the `at`-th change; see shim.c."""
    return {
        "LD_PRELOAD": str(shim),
        "FAULT_ROOT": str(project.folder),
        "FAULT_ONLY": f"stages.{stage}",
        "FAULT_MODE": mode,
        "FAULT_AT": str(at),
        "FAULT_ERROR": str(error),
        **({"FAULT_LOG": str(log)} if log else {}),
    }
