"""The pipeline on a system without /proc and glibc, as macOS is, and without the compiled library.

Every Python process of the pipeline, DVC's included, imports a module that hides them. A real
namespace without /proc needs privileges that continuous integration may not have; docs/results.md
has the command for one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.project_clone import STAGES, Clone, ran

pytestmark = pytest.mark.slow

HIDES = """
import platform, sys

platform.libc_ver = lambda *args, **kwargs: ("", "")

def hide(event, args):
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", args[0])

sys.addaudithook(hide)
"""
PROBE = """
import gptj8.kernels.cpu
from gptj8.runtime import machine

print(gptj8.kernels.cpu.library(), machine.own_bytes(), machine.peak_memory_gib() > 0)
try:
    print(open("/proc/self/status").read())
except FileNotFoundError:
    print("hidden")
"""


def test_pipeline_needs_no_proc_no_glibc_and_no_compiled_library(tmp_path, tiny_model_dir):
    clone = Clone(tmp_path / "project", tiny_model_dir)
    (tmp_path / "hides").mkdir()
    (tmp_path / "hides" / "sitecustomize.py").write_text(HIDES)
    hides = {"PYTHONPATH": str(tmp_path / "hides")}
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=clone.folder, env={**os.environ, **hides}, capture_output=True, text=True,
    )  # fmt: skip
    assert probe.stdout.split("\n")[:2] == ["None 0 True", "hidden"], probe.stderr

    hidden = clone.dvc("repro", **hides)
    assert ran(hidden) == list(STAGES), hidden.stderr
    assert "Traceback" not in hidden.stdout + hidden.stderr
    assert clone.metrics("export")["max_logit_difference"] == 0.0
    assert clone.metrics("finetune")["peak_memory_gib"] > 0
    (run,) = clone.runs().values()
    assert run.info.status == "FINISHED"
    digest = clone.adapter_digest()

    # The adapter is the one of this system.
    clone.dvc("repro", "--force", "--single-item", "finetune")
    assert clone.adapter_digest() == digest
