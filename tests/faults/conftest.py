"""What was tried and what held, counted over all tests of faults and shown at the end."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage_project import StageProject, build_shim
from tests.helpers.project_clone import STAGES

_TRIED: Counter[str] = Counter()
_HELD: Counter[str] = Counter()


@pytest.fixture(scope="session")
def tally() -> Callable[[str, bool], None]:
    """Count one fault of a kind, and whether it was survived."""

    def count(fault: str, held: bool) -> None:
        _TRIED[fault] += 1
        _HELD[fault] += held

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TRIED:
        terminalreporter.write_line("")
        terminalreporter.write_line("| fault | tried | held |")
        terminalreporter.write_line("|---|---|---|")
        for fault, tried in _TRIED.items():
            terminalreporter.write_line(f"| {fault} | {tried:,} | {_HELD[fault]:,} |")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> StageProject:
    """A project in which every stage ran to its end. Not to be changed."""
    project = StageProject(tmp_path_factory.mktemp("undisturbed") / "project", tiny_model_dir)
    project.run_all()
    return project


@pytest.fixture(scope="session")
def changes(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: StageProject, shim: Path
) -> Callable[[str], list[str]]:
    """Return what a stage changes in the project, in order: `rename /path`, `write /path` ..."""
    known: dict[str, list[str]] = {}
    folder = tmp_path_factory.mktemp("changes")

    def of(stage: str) -> list[str]:
        assert stage in STAGES
        if stage not in known:
            project = undisturbed.copy(folder / stage)
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
    """Return the environment in which a stage meets a fault at its `at`-th change; see shim.c."""
    return {
        "LD_PRELOAD": str(shim),
        "FAULT_ROOT": str(project.folder),
        "FAULT_ONLY": f"stages.{stage}",
        "FAULT_MODE": mode,
        "FAULT_AT": str(at),
        "FAULT_ERROR": str(error),
        **({"FAULT_LOG": str(log)} if log else {}),
    }
