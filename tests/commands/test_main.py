"""The command line, run as a process."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.project_clone import hear_interrupts


def gptj8(*arguments, cwd):
    command = [sys.executable, "-m", "gptj8.commands.main", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def assert_error(process, *parts):
    """Assert one error line, exit code 2 and no traceback."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for part in parts:
        assert part in lines[0]


def test_convert_writes_a_model(tiny_model_dir, tmp_path):
    process = gptj8("convert", tiny_model_dir, tmp_path / "out", "--block-size", 256, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "relative RMS error 0.5" in process.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--block-size", "3"], ["block_size = 3"]),
        (["--block-size", "18446744073709551616"], ["block_size = 18446744073709551616"]),
        (["--codebook", "linear"], ["codebook = 'linear'"]),
    ],
    ids=str,
)
def test_convert_rejects_invalid_options(tiny_model_dir, tmp_path, options, parts):
    assert_error(gptj8("convert", tiny_model_dir, tmp_path / "o", *options, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


def test_convert_rejects_a_missing_source_and_an_existing_target(tiny_model_dir, tmp_path):
    assert_error(gptj8("convert", tmp_path / "none", tmp_path / "o", cwd=tmp_path), "none")
    assert_error(gptj8("convert", tiny_model_dir, tmp_path, cwd=tmp_path), "already exists")


def test_check_names_missing_inputs(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    process = gptj8("check", cwd=tmp_path)
    assert process.returncode == 2
    assert [line.split(" does not exist")[0] for line in process.stderr.splitlines()] == [
        "error: data.train: data/datasets/docstrings/splits",
        "error: model.path = data/models/tiny-gptj/model",
    ]


def test_gate_checks_the_last_run(tmp_path):
    (tmp_path / "reports" / "evaluate").mkdir(parents=True)
    (tmp_path / "reports" / "evaluate" / "metrics.json").write_text('{"tuned/accuracy": 0.8}')

    def gate(require):
        (tmp_path / "params.yaml").write_text(
            f"data: {{train: x.csv}}\nmodel: {{path: m}}\nevaluate: {{require: {require}}}\n"
        )
        return gptj8("gate", cwd=tmp_path)

    met = gate("[tuned/accuracy > 0.5]")
    assert met.returncode == 0 and "holds by 0.3" in met.stdout
    assert_error(gate("[tuned/accuracy > 0.9]"), "does not meet")
    assert_error(gate("[accuracy > 0.9]"), "did you mean tuned/accuracy?")
    assert_error(gate("[]"), "evaluate.require is empty")
    assert_error(gate("tuned/accuracy > 0.9"), "evaluate.require", "should be a list")


def test_summary_without_a_run_is_an_error(tmp_path):
    assert_error(gptj8("summary", cwd=tmp_path), "make repro")


def test_help_lists_the_commands_without_importing_torch(tmp_path):
    process = gptj8("--help", cwd=tmp_path)
    assert process.returncode == 0
    for command in ("check", "convert", "summary", "ui"):
        assert command in process.stdout
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, gptj8.commands.main; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert modules.stdout.strip() == "False"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_signals_set_the_exit_code(sent, code):
    program = (
        "import time; from gptj8.runtime.process import run; "
        "run(lambda: (print(flush=True), time.sleep(30)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_interrupts,
    )
    process.stdout.readline()
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert b"Traceback" not in stderr
