"""The deps of each stage in dvc.yaml are exactly the files that can change its outputs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers.paths import ROOT
from tests.helpers.project_clone import STAGES

# Modules that affect how a stage interacts with the system, MLflow or the user, but not what it
# writes. If they were deps, every change of params, tracking or progress output would reconvert the
# model. The memory estimate is neutral too: it only decides how `auto` splits a batch, which
# depends on the free memory and not on any file.
NEUTRAL = (
    "gptj8/__init__.py",
    "gptj8/memory/",
    "gptj8/params/",
    "gptj8/runtime/",
    "gptj8/serving/",
    "gptj8/tracking/",
)
WATCHED = ("gptj8/params/templates.py", "gptj8/runtime/distributed.py", "gptj8/runtime/manifest.py")
# The output of the conversion does not depend on the kernels (tests/kernels/test_cpu.py), so a
# faster kernel is no reason to convert again. They are imported only because loading a model shares
# a module with the conversion.
UNUSED = {
    "convert": tuple(
        f"gptj8/kernels/{name}.py" for name in ("cpu", "dispatch", "fused", "gpu", "operators")
    ),
}


def imports_of(file: Path) -> set[Path]:
    """Return the project's files that a file imports, including imports inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = set()
    for name in names:
        if name.split(".")[0] in ("gptj8", "stages"):
            stem = ROOT / name.replace(".", "/")
            paths |= {p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()}
    return paths


def is_neutral(path: Path) -> bool:
    if not path.stat().st_size:  # an empty __init__.py
        return True
    name = path.relative_to(ROOT).as_posix()
    return name.startswith(NEUTRAL) and name not in WATCHED


def closure(file: Path) -> set[str]:
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        if path not in found and (path == file or not is_neutral(path)):
            found.add(path)
            waiting += imports_of(path)
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.parametrize("stage", STAGES)
def test_declared_deps_equal_import_closure(stage):
    definition = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    declared = {dep for dep in definition["deps"] if dep.startswith(("gptj8/", "stages/"))}
    unused = set(UNUSED.get(stage, ()))
    needed = closure(ROOT / "stages" / f"{stage}.py") - unused
    folders = {dep for dep in declared if not dep.endswith(".py")}
    needed = {f for f in needed if not any(f.startswith(f"{folder}/") for folder in folders)}
    assert declared - folders == needed


def test_every_param_is_declared_by_a_stage():
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    declared = {name for stage in stages.values() for name in stage["params"]}
    assert set(params) - declared == {"tracking"}
