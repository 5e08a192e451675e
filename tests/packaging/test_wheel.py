"""The built wheel: every module imports and the commands work outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, pkgutil, gptj8
names = [m.name for m in pkgutil.walk_packages(gptj8.__path__, "gptj8.")]
names.remove("gptj8.tracking.__main__")  # importing it runs it
names = [n for n in names if not n.endswith("._cpu_kernels")]  # loaded by ctypes, not a module
for name in names:
    importlib.import_module(name)
from gptj8.kernels import cpu
print(gptj8.__file__, len(names), cpu.library() and cpu.library()._name)
"""


def run(*command: object, cwd: Path, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the repository's files, without files of earlier builds."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "data/", ".dvc/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", source]
    run(*command, "--wheel-dir", target, cwd=target)
    (file,) = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Return the Python of a new environment with the wheel and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    # A folder added by a .pth file is importable, but its own .pth files, such as that of an
    # editable gptj8, are ignored.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run(*install, "--force-reinstall", "--no-index", wheel, cwd=folder.parent)
    return python


def test_the_wheel_contains_every_file_of_the_package(wheel):
    contained = set(zipfile.ZipFile(wheel).namelist())
    sources = run("git", "ls-files", "-co", "--exclude-standard", "gptj8", cwd=ROOT).splitlines()
    expected = {name for name in sources if (ROOT / name).is_file() and not name.endswith(".c")}
    assert expected <= contained
    assert {"gptj8/py.typed", "gptj8/dataset/validation/report.html"} <= expected
    assert not [name for name in contained if name.startswith(("tests", "stages", "benchmarks"))]


def test_every_module_and_the_packages_own_library_load(python, tmp_path):
    where, count, library = run(python, "-c", IMPORT_ALL, cwd=tmp_path).split()
    assert Path(where).is_relative_to(python.parents[1])
    assert int(count) > 100
    if shutil.which("cc"):
        assert Path(library).is_relative_to(python.parents[1])


def test_a_model_is_converted_and_generates(python, tiny_model_dir, tmp_path):
    gptj8 = python.with_name("gptj8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    converted = run(gptj8, "convert", tiny_model_dir, "model-8bit", cwd=tmp_path, env=environment)
    assert "relative RMS error" in converted
    options = ["--model", "model-8bit", "--adapter", "none", "--max-new-tokens", "4"]
    answer = run(gptj8, "generate", "the quick", *options, cwd=tmp_path, env=environment)
    assert answer.strip()
