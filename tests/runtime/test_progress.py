"""Progress on a terminal and in a log, and the imports of the entry points."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gptj8.runtime.progress import Progress, each, format_seconds, progress
from gptj8.runtime.story import Story
from gptj8.training.progress import TrainingProgress
from tests.helpers.paths import ROOT


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_stage(monkeypatch):
    """A stage that failed in this process would name itself in every line."""
    monkeypatch.setattr("gptj8.runtime.progress._speaker", "")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("gptj8.runtime.progress.time.monotonic", clock)
    return clock


@pytest.fixture
def be_terminal(monkeypatch):
    """Return a function that makes stderr a terminal.

    Tests call it themselves because pytest replaces stderr after fixtures are set up.
    """
    return lambda: _be_terminal(monkeypatch)


def _be_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("gptj8.runtime.progress._REFRESH_SECONDS", 0)
    monkeypatch.setenv("COLUMNS", "120")


def test_a_story_prints_the_stage_name_and_the_duration(capsys, monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    story = Story("finetune")
    story.say("LoRA r=8")
    story.end("done")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "finetune: LoRA r=8"
    assert re.fullmatch(r"finetune: done; \d\.\d s", last)


def test_a_story_under_dvc_begins_with_the_reason(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_STAGE", "finetune")
    monkeypatch.chdir(tmp_path)
    Story("finetune").end("done")
    assert capsys.readouterr().out.startswith("finetune: first run\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99, "99 s"), (100, "2 min"),
     (5940, "99 min"), (6000, "1 h 40 min"), (90000, "25 h 0 min")],
)  # fmt: skip
def test_durations_are_readable(seconds, text):
    assert format_seconds(seconds) == text


def test_a_log_has_a_line_every_half_minute_with_the_time_left(capsys, clock):
    with progress(100, "base: labels", "rows") as advance:
        for _ in range(100):
            clock.now += 1
            advance()
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err
    assert captured.err.splitlines() == [
        "base: labels: 30 of 100 rows, 70 s left",
        "base: labels: 60 of 100 rows, 40 s left",
        "base: labels: 90 of 100 rows, 10 s left",
        "base: labels: 100 of 100 rows, took 2 min",
    ]


def test_a_log_has_no_lines_for_short_work(capsys, clock):
    assert list(each("abc", 3, "read", "files")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_failed_work_is_not_reported_as_done(capsys, clock):
    with pytest.raises(KeyError), progress(10, "read", "bytes") as advance:
        clock.now = 40
        advance(5)
        raise KeyError
    assert capsys.readouterr().err == "read: 5 B of 10 B, 40 s left\n"


def test_a_terminal_has_a_bar_that_is_removed(capsys, be_terminal):
    be_terminal()
    with progress(4, "read", "files") as advance:
        advance(2)
        advance.show("loss 1.000")
        advance()
    err = capsys.readouterr().err
    assert "read:  75%" in err and re.search(r"3 of 4 files, \d\d:\d\d left, loss 1.000", err)
    assert "\n" not in err and err.rsplit("\r", 2)[-1].strip() == ""


def train_with(shown: TrainingProgress, measured: SimpleNamespace, clock: Clock) -> None:
    """Send the events of 40 steps of 2 s, with a validation of 3 batches after step 20."""
    state = SimpleNamespace(max_steps=40, global_step=0)
    shown.on_train_begin(None, state, None)
    for step in range(1, 41):
        clock.now += 2
        state.global_step = step
        measured.tokens_per_second = 500.0
        if step == 10:
            measured.history.append({"step": step, "loss": 0.5})
        shown.on_step_end(None, state, None)
        if step == 20:
            for _ in range(3):
                shown.on_prediction_step(None, state, None, eval_dataloader=[1, 2, 3])
            measured.history.append({"step": step, "eval_loss": 0.75})
            shown.on_log(None, state, None)
            measured.history[-1]["eval_accuracy"] = 0.8123
            shown.on_evaluate(None, state, None)


def test_training_progress_in_a_log(capsys, clock):
    measured = SimpleNamespace(history=[], tokens_per_second=0.0)
    with TrainingProgress(measured) as shown:
        train_with(shown, measured, clock)
    assert capsys.readouterr().err.splitlines() == [
        "training: 15 of 40 steps, loss 0.500, 500 tokens/s, 50 s left",
        "training: 20 of 40 steps, loss 0.500, accuracy 81.2%, 500 tokens/s, 40 s left",
        "training: 35 of 40 steps, loss 0.500, accuracy 81.2%, 500 tokens/s, 10 s left",
        "training: 40 of 40 steps, loss 0.500, accuracy 81.2%, 500 tokens/s, took 80 s",
    ]


def test_training_progress_on_a_terminal_is_one_bar(capsys, clock, be_terminal):
    be_terminal()
    measured = SimpleNamespace(history=[], tokens_per_second=0.0)
    with TrainingProgress(measured) as shown:
        train_with(shown, measured, clock)
    err = capsys.readouterr().err
    last = [part for part in err.split("\r") if "40 of 40 steps" in part][-1]
    assert "loss 0.500, accuracy 81.2%, 500 tokens/s" in last
    assert "validation loss: " in err  # a second bar during validation
    assert err.split("\r")[-1].strip() == ""


def test_an_error_in_training_removes_the_bars(capsys, be_terminal):
    be_terminal()
    measured = SimpleNamespace(history=[], tokens_per_second=0.0)
    with pytest.raises(KeyError), TrainingProgress(measured) as shown:
        shown.on_train_begin(None, SimpleNamespace(max_steps=40), None)
        raise KeyError
    assert capsys.readouterr().err.split("\r")[-1].strip() == ""


def test_progress_lines_begin_with_the_stage_name(capsys, clock, monkeypatch):
    monkeypatch.setattr("gptj8.runtime.progress._speaker", "convert")
    for description in ("convert", "read"):
        shown = Progress(10, description, "rows")
        shown(5)
        shown.tell()
    assert capsys.readouterr().err.splitlines() == [
        "convert: 5 of 10 rows, 0.0 s left",
        "convert: read: 5 of 10 rows, 0.0 s left",
    ]


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        # `gptj8 --help` takes 0.2 s, and DVC may start a stage that has nothing to do.
        (
            "import gptj8.commands.main; gptj8.commands.main._parser()",
            ("torch", "mlflow", "transformers", "pandas"),
        ),
        ("import stages.validate", ("torch", "mlflow", "transformers", "scipy.stats")),
        ("import stages.finetune, stages.evaluate", ("torch", "mlflow", "transformers", "pandas")),
        ("import stages.convert, stages.export", ("torch", "mlflow", "transformers", "pandas")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_large_packages_are_imported_only_when_needed(code, modules):
    code = f"{code}\nimport sys; print([m for m in {modules!r} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
