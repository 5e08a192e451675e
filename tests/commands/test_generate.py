"""`gptj8 generate` with files, run as a process."""

from __future__ import annotations

from tests.commands.test_main import assert_error, gptj8
from tests.helpers.answered_files import read_answers


def test_rows_of_a_file_are_answered(exports, tiny_8bit_dir, tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n1,the fox\n2,a lazy dog\n")
    model = ["--model", tiny_8bit_dir, "--adapter", exports["classification"]]
    files = ["--input", "rows.csv", "--output", "answers.jsonl"]
    done = gptj8("generate", *model, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    rows = read_answers(tmp_path / "answers.jsonl")
    assert [row["id"] for row in rows] == ["1", "2"]
    (tmp_path / "rows.csv").write_text("id,text\n1,the fox\n2,\n3,\n")
    done = gptj8("generate", *model, "--input", "rows.csv", "--output", "b.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[:2] == [
        "error: rows.csv row 2: text is empty",
        "error: rows.csv row 3: text is empty",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "rows.csv"]


def test_a_file_without_the_column_is_refused(exports, tiny_8bit_dir, tmp_path):
    (tmp_path / "rows.csv").write_text("id,texts\n1,the fox\n")
    model = ["--model", tiny_8bit_dir, "--adapter", exports["classification"]]
    done = gptj8("generate", *model, "--input", "rows.csv", "--output", "b.csv", cwd=tmp_path)
    assert_error(done, "rows.csv has no column text", "did you mean texts?")
