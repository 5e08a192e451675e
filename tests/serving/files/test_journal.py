"""A command that was interrupted goes on where it stopped, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc

import pytest

from gptj8.runtime.errors import UserError
from gptj8.runtime.locks import locked
from gptj8.serving.files import answering
from gptj8.serving.files.answering import Questions
from gptj8.serving.files.journal import Journal, RowAnswer, fingerprint
from tests.helpers.answered_files import generate, texts
from tests.helpers.paths import ROOT

COUNT = 29


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", 8)
    monkeypatch.setattr(answering, "_CLASSIFIED_AT_ONCE", 3)
    monkeypatch.setattr(answering, "ROWS_AT_ONCE", 3)
    rows = [{"instruction": text, "text": text} for text in texts(COUNT)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(model, export, folder, *arguments):
    files = ["--input", folder / "rows.jsonl", "--output", folder / "a.csv"]
    generate(model, export, *files, *arguments)
    return (folder / "a.csv").read_bytes()


@pytest.fixture
def asked(monkeypatch):
    """The number of rows of each batch, and how many batches come before an interruption."""
    batches, left = [], [10**9]
    ask = Questions.ask

    def count(self, prompts, places):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        batches.append(len(prompts))
        return ask(self, prompts, places)

    monkeypatch.setattr(Questions, "ask", count)
    return batches, left


@pytest.mark.parametrize(
    ("task", "options"),
    [("classification", []), ("instructions", ["--max-new-tokens", 5]),
     ("instructions", ["--max-new-tokens", 5, "--temperature", 2, "--seed", 1])],
    ids=["labels", "greedy", "sampled"],
)  # fmt: skip
def test_no_row_is_answered_twice(exports, tiny_8bit_dir, files, asked, task, options, capsys):
    batches, left = asked
    expected = run(tiny_8bit_dir, exports[task], files, *options)
    (files / "a.csv").unlink()
    assert sum(batches) == COUNT
    whole = list(batches)
    batches.clear()
    for before in (0, 1, 2, 3, 1):
        left[0] = before
        with pytest.raises(KeyboardInterrupt):
            run(tiny_8bit_dir, exports[task], files, *options)
        assert sorted(p.name for p in files.iterdir()) == [".a.csv.journal", "rows.jsonl"]
        kept = capsys.readouterr().err.splitlines()[-1]
        assert kept.startswith(f"{sum(batches)} answers kept in ")
    left[0] = 10**9
    capsys.readouterr()
    assert run(tiny_8bit_dir, exports[task], files, *options) == expected
    assert f"{sum(whole[:7])} of {COUNT} rows were answered before" in capsys.readouterr().err
    assert batches == whole
    assert sorted(p.name for p in files.iterdir()) == ["a.csv", "rows.jsonl"]


def test_answers_of_another_input_model_or_options_are_refused(
    exports, tiny_8bit_dir, files, asked
):
    _, left = asked
    export = files / "export"
    shutil.copytree(exports["instructions"], export)
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        run(tiny_8bit_dir, export, files)
    journal = (files / ".a.csv.journal").read_bytes()
    left[0] = 10**9

    def refusal(*options):
        with pytest.raises(UserError) as raised:
            run(tiny_8bit_dir, export, files, *options)
        assert (files / ".a.csv.journal").read_bytes() == journal
        assert not (files / "a.csv").exists()
        return str(raised.value)

    assert "not for the same request; choose another --output" in refusal("--max-new-tokens", 5)
    content = (files / "rows.jsonl").read_text()
    (files / "rows.jsonl").write_text(content.replace("fox", "cat"))
    assert "not for the same input;" in refusal()
    (files / "rows.jsonl").write_text(content)
    weights = export / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3f")
    (export / "manifest.json").unlink()
    assert "not for the same model;" in refusal()
    assert "dtype" in refusal("--dtype", "bfloat16")


def test_a_second_process_is_refused(exports, tiny_8bit_dir, files):
    with (
        locked(files / ".a.csv.lock"),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        run(tiny_8bit_dir, exports["classification"], files)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_is_cut_off_is_removed(tmp_path, cut):
    journal = Journal(tmp_path / "j", {"input": "a"})
    journal.add(0, {4: RowAnswer("x\ny", 0.5), 2: RowAnswer("é", 0.25, (0.25, 0.75))})
    journal.add(1, {9: RowAnswer("z", 1.0)})
    journal.close()
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(content[:-cut])
    again = Journal(tmp_path / "j", {"input": "a"})
    assert (again.window, again.count) == (0, 2)
    assert again.answers == {4: RowAnswer("x\ny", 0.5), 2: RowAnswer("é", 0.25, (0.25, 0.75))}
    again.add(1, {9: RowAnswer("z", 1.0)})
    assert (tmp_path / "j").read_bytes() == content
    assert [(number, sorted(found)) for number, found in again.windows()] == [(0, [2, 4]), (1, [9])]
    again.close()


def test_a_header_that_is_cut_off_begins_anew(tmp_path):
    (tmp_path / "j").write_bytes(b'{"input": "b')
    journal = Journal(tmp_path / "j", {"input": "a"})
    assert journal.count == 0
    assert (tmp_path / "j").read_bytes() == b'{"input": "a"}\n'
    journal.close()


def test_a_journal_of_many_rows_needs_little_memory(tmp_path):
    journal = Journal(tmp_path / "j", {})
    for window in range(60):
        rows = range(1024 * window, 1024 * (window + 1))
        line = {"window": window, "rows": [[row, "an answer" * 9, 0.5, []] for row in rows]}
        journal._file.write((json.dumps(line) + "\n").encode())
    journal.close()
    tracemalloc.start()
    again = Journal(tmp_path / "j", {})
    assert again.count == 60 * 1024
    assert sum(len(found) for _, found in again.windows()) == 60 * 1024
    assert tracemalloc.get_traced_memory()[1] < 3 << 20  # of 7 MB on the disk
    tracemalloc.stop()
    again.close()


def test_the_fingerprint_follows_weights_and_not_reports(tmp_path):
    for name in ("weights.bin", "README.md", "metrics.json", "merged"):
        (tmp_path / name).write_text("1") if name != "merged" else (tmp_path / name).mkdir()
    (tmp_path / "merged" / "weights.bin").write_text("1")
    first = fingerprint([tmp_path])
    for name in ("README.md", "metrics.json", "merged/weights.bin"):
        (tmp_path / name).write_text("2")
        assert fingerprint([tmp_path]) == first
    (tmp_path / "weights.bin").write_text("2")
    assert fingerprint([tmp_path]) != first


KILLED = """
import os, signal, sys
from gptj8.serving.files import answering, journal
from tests.helpers.answered_files import generate
answering.WINDOW, answering._CLASSIFIED_AT_ONCE = 8, 3
place, count = sys.argv[1], int(sys.argv[2])
calls = 0
def die(): os.kill(os.getpid(), signal.SIGKILL)
def killed(original, before):
    def call(*arguments):
        global calls
        calls += 1
        if calls == count and before: die()
        result = original(*arguments)
        if calls == count: die()
        return result
    return call
def torn(self, line):
    global calls
    calls += 1
    self._file.write(line[: len(line) // 2] if calls == count else line)
    self._file.flush()
    if calls == count: die()
if place == "torn": journal.Journal._append = torn
if place == "before": journal.Journal.add = killed(journal.Journal.add, True)
if place == "after": journal.Journal.add = killed(journal.Journal.add, False)
if place == "writing": answering._cells = killed(answering._cells, True)
generate(*sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count"),
    [("before", 1), ("torn", 1), ("torn", 4), ("after", 5), ("writing", 1), ("writing", 20)],
)
def test_a_killed_process_is_continued(exports, tiny_8bit_dir, files, asked, place, count):
    batches, _ = asked
    export = exports["classification"]
    expected = run(tiny_8bit_dir, export, files)
    whole = list(batches)
    (files / "a.csv").unlink()
    options = ["--input", files / "rows.jsonl", "--output", files / "a.csv"]
    command = [sys.executable, "-c", KILLED, place, count, tiny_8bit_dir, export, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (files / "a.csv").exists()
    assert (files / ".a.csv.journal").exists()
    batches.clear()
    assert run(tiny_8bit_dir, export, files) == expected
    finished = {"before": 0, "torn": max(0, count - 2), "after": count, "writing": len(whole)}
    assert batches == whole[finished[place] :]
    assert sorted(p.name for p in files.iterdir()) == ["a.csv", "rows.jsonl"]
