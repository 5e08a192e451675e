"""The package's layers: each package imports only from itself and from lower layers."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.paths import ROOT

LAYERS = (
    ("runtime",),
    ("params", "kernels"),
    ("dataset", "quantization"),
    ("model",),
    ("training", "evaluation", "serving"),
    ("memory", "export", "tracking"),
    ("commands",),
)
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}
FILES = sorted((ROOT / "gptj8").rglob("*.py"))
# The public names in gptj8/__init__.py are imported lazily.


def imported_packages(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "gptj8" and len(parts) > 1 and parts[1] in LAYER:
                yield parts[1]


def test_every_package_belongs_to_a_layer():
    packages = {path.name for path in (ROOT / "gptj8").iterdir() if path.is_dir()}
    assert packages - {"__pycache__"} == set(LAYER)
    assert [path.name for path in (ROOT / "gptj8").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("package", LAYER)
def test_packages_import_only_from_lower_layers(package):
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file in FILES
        if file.relative_to(ROOT / "gptj8").parts[0] == package
        for other in imported_packages(file)
        if other != package and LAYER[other] >= LAYER[package]
    ]
    assert wrong == []


def test_tests_mirror_the_package():
    packages = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert set(LAYER) <= packages
