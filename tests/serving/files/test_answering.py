"""Rows of files are answered as `--row` answers each alone, and keep their columns."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tracemalloc

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.evaluation import suite as evaluation
from gptj8.model.generation.batch import Sampling
from gptj8.params.sections import parse_params
from gptj8.runtime.errors import UserError
from gptj8.serving.files import answering
from gptj8.serving.files.answering import Questions
from gptj8.serving.files.journal import RowAnswer
from tests.helpers.answered_files import generate, read_answers, texts
from tests.helpers.served_models import LABELS, data_of

COUNT = 21
ADDED = ["answer", "confidence", *(f"probability_{label}" for label in LABELS)]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", 8)
    monkeypatch.setattr(answering, "_CLASSIFIED_AT_ONCE", 3)


def table():
    return pd.DataFrame(
        {"id": range(COUNT), "text": texts(COUNT), "note, with comma": ["=1+1\n", "é", '"'] * 7}
    )


def write_csv(path):
    table().to_csv(path, index=False)


def write_records(path):
    path.write_text(json.dumps(table().to_dict("records")))


def write_stream(path):
    rows = pa.Table.from_pandas(table())
    with pa.ipc.new_stream(str(path), rows.schema) as stream:
        stream.write_table(rows)


WRITERS = {
    "rows.csv": write_csv,
    "rows.tsv": lambda path: table().to_csv(path, index=False, sep="\t"),
    "rows.csv.gz": lambda path: path.write_bytes(
        gzip.compress(table().to_csv(index=False).encode())
    ),
    "rows.jsonl": lambda path: table().to_json(path, orient="records", lines=True),
    "rows.json": write_records,
    "rows.parquet": lambda path: table().to_parquet(path, index=False),
    "rows.arrow": write_stream,
}


@pytest.fixture
def alone(predictors):
    """Label and probabilities of each row, asked alone."""
    predictor = predictors["classification"]
    found = []
    for text in texts(COUNT):
        (scores,) = predictor.classify([predictor.encode_for_labels({"text": text}).ids])
        found.append((LABELS[int(scores.argmax())], scores))
    return found


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_of_every_format(exports, tiny_8bit_dir, tmp_path, alone, name, suffix):
    source, output = tmp_path / name, tmp_path / f"answers{suffix}"
    WRITERS[name](source)
    arguments = ["--input", source, "--output", output]
    generate(tiny_8bit_dir, exports["classification"], *arguments)
    rows = read_answers(output)
    assert [list(row) for row in rows] == [[*table().columns, *ADDED]] * COUNT
    for row, given, (label, scores) in zip(rows, table().to_dict("records"), alone, strict=True):
        assert row["text"] == given["text"]
        assert str(row["id"]) == str(given["id"])
        assert row["note, with comma"] == given["note, with comma"]
        assert row["answer"] == label
        probabilities = [float(row[f"probability_{label}"]) for label in LABELS]
        assert probabilities == pytest.approx(scores, abs=2e-5)
        assert float(row["confidence"]) == max(probabilities)
    assert len({row["answer"] for row in rows}) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, output.name])
    if suffix == ".parquet":
        number = pa.string() if ".csv" in name or ".tsv" in name else pa.int64()
        assert pq.read_schema(output).field("id").type == number


def test_a_text_file_has_a_row_on_each_line(exports, tiny_8bit_dir, tmp_path, alone):
    (tmp_path / "rows.txt").write_text("\n".join(texts(COUNT)) + "\n")
    arguments = ["--input", tmp_path / "rows.txt", "--output", tmp_path / "a.csv"]
    generate(tiny_8bit_dir, exports["classification"], *arguments)
    rows = read_answers(tmp_path / "a.csv")
    assert [row["text"] for row in rows] == texts(COUNT)
    assert [row["answer"] for row in rows] == [label for label, _ in alone]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_completions_equal_those_of_rows_asked_alone(
    exports, predictors, tiny_8bit_dir, tmp_path, capsys, sampled
):
    rows = [{"instruction": text, "input": text[:9]} for text in texts(COUNT)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ["--max-new-tokens", 7]
    how += ["--temperature", 1.5, "--seed", 3] if sampled else []
    files = ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "a.jsonl"]
    generate(tiny_8bit_dir, exports["instructions"], *files, *how)
    answers = read_answers(tmp_path / "a.jsonl")
    assert len({row["answer"] for row in answers}) > 2
    capsys.readouterr()
    for number, (row, answered) in enumerate(zip(rows, answers, strict=True)):
        predictor = predictors["instructions"]
        ids = predictor.encode_row(row, 7).ids
        sampling = Sampling(7, 1.5, seed=3 + number) if sampled else Sampling(7)
        (alone,) = predictor.answer([ids], [sampling])
        assert answered["answer"] == alone.text
        assert answered["confidence"] == pytest.approx(alone.confidence, rel=1e-4)
        assert list(answered) == [*row, "answer", "confidence"]
    generate(tiny_8bit_dir, exports["instructions"], "--row", json.dumps(rows[0]), *how)
    # A character that the limit of tokens has cut is not shown on the terminal.
    assert capsys.readouterr().out == answers[0]["answer"].rstrip("\ufffd") + "\n"


@pytest.mark.parametrize("task", ["classification", "instructions"])
def test_prompts_are_those_of_the_evaluation(exports, predictors, tmp_path, monkeypatch, task):
    """`evaluate` encodes rows of the prepared dataset, here made from the same columns."""
    asked = {}

    def ask(self, prompts, places):
        asked.update(zip(places, prompts, strict=True))
        return [RowAnswer("fox", 1.0, (1.0,) * len(self.columns[2:]))] * len(prompts)

    monkeypatch.setattr(Questions, "ask", ask)
    long = [*texts(9), "lazy dog " * 80, "  jumps\n"]
    columns = ("text", "n") if task == "classification" else ("instruction", "input")
    rows = [{columns[0]: text, columns[1]: text[:40]} for text in long]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictor = predictors[task]
    monkeypatch.setattr("gptj8.commands.generate_file.load_predictor", lambda arguments: predictor)
    files = ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "a.csv"]
    generate(tmp_path, exports[task], *files)

    data = parse_params({"data": data_of(task), "model": {"path": "m"}})
    shape = shape_of(data.data)
    frame = pd.DataFrame([{**row, shape.answer: "fox"} for row in rows])
    fields = shape.to_fields(frame)
    questions = evaluation.Questions.of_rows(
        data.data.task,
        fields,
        LABELS if task == "classification" else (),
        PromptEncoder(predictor.encoder, shape.prompt_template, data.data.max_length),
        max_new_tokens=data.evaluate.max_new_tokens,
    )
    assert [asked[place] for place in range(len(rows))] == questions.prompts


@pytest.mark.parametrize("task", ["columns", "messages"])
def test_rows_of_other_tasks(exports, predictors, tiny_8bit_dir, tmp_path, task):
    if task == "columns":
        rows = [{"title": text, "body": None if n % 3 else text[:8]}
                for n, text in enumerate(texts(9))]  # fmt: skip
    else:
        rows = [{"chat": [{"role": "user", "content": text}]} for text in texts(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "a.parquet"]
    generate(tiny_8bit_dir, exports[task], *files)
    predictor = predictors[task]
    for row, answered in zip(rows, read_answers(tmp_path / "a.parquet"), strict=True):
        if task == "columns":
            (scores,) = predictor.classify([predictor.encode_for_labels(row).ids])
            assert answered["answer"] == LABELS[int(scores.argmax())]
        else:
            tokens = predictor.answer_tokens
            ids = predictor.encode_row(row, tokens).ids
            assert answered["answer"] == predictor.complete([ids], tokens)[0]
        assert {name: answered[name] for name in row} == row


def test_cells_without_a_common_type_become_text_in_parquet(exports, tiny_8bit_dir, tmp_path):
    extra = [1, "a", [1, {"b": None}], {}, None, 2.5, True, {"c": "é"}, 9]
    rows = [{"text": text, "extra": cell} for text, cell in zip(texts(9), extra, strict=True)]
    del rows[4]["extra"]
    rows[8]["late"] = 2**70
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / "a.parquet"]
    generate(tiny_8bit_dir, exports["classification"], *files)
    found = read_answers(tmp_path / "a.parquet")
    assert [row["extra"] for row in found] == [
        *("1", "a", '[1, {"b": null}]', "{}", None, "2.5", "true", '{"c": "é"}', "9"),
    ]
    assert [row["late"] for row in found] == [None] * 8 + [str(2**70)]


def test_carriage_returns_and_formulas_are_kept_in_csv(exports, tiny_8bit_dir, tmp_path):
    rows = pd.DataFrame({"text": ["the fox", "the dog"], "kept": ["a\rb", "=1+1"]})
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    files = ["--input", tmp_path / "rows.parquet", "--output", tmp_path / "a.csv"]
    generate(tiny_8bit_dir, exports["classification"], *files)
    assert [row["kept"] for row in read_answers(tmp_path / "a.csv")] == ["a\rb", "=1+1"]
    assert pd.read_csv(tmp_path / "a.csv")["kept"].tolist() == ["a\rb", "=1+1"]


def refused(model, export, folder, content, *arguments, name="rows.csv", output="a.csv"):
    """Return the lines of the error; nothing may have been written."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(path.name for path in folder.iterdir())
    files = ["--input", folder / name, "--output", folder / output]
    with pytest.raises(UserError) as raised:
        generate(model, export, *files, *arguments)
    assert sorted(path.name for path in folder.iterdir()) == before
    return [line.removeprefix(f"{folder}/") for line in str(raised.value).splitlines()]


def test_rows_that_cannot_be_answered_are_named(exports, tiny_8bit_dir, tmp_path, monkeypatch):
    export = exports["classification"]
    content = "text,n\nthe fox,1\n,2\n\u00ff,3\n\u200b,4\n"
    monkeypatch.setattr(answering, "_answer_all", lambda *arguments: pytest.fail("answered"))
    lines = refused(tiny_8bit_dir, export, tmp_path, content)
    assert lines[:2] == ["rows.csv row 2: text is empty", "rows.csv row 4: text is empty"]
    assert len(lines) == 3 and "--allow-invalid" in lines[2]
    lines = refused(
        *(tiny_8bit_dir, export, tmp_path),
        '{"text": "a"}\n{"text": 7}\n{"text": "a\\ud800"}\nno\n{"text": "a", "b": 1, "b": 2}\n',
        *("--allow-invalid",),
        name="rows.jsonl",
    )
    assert lines[:4] == [
        "rows.jsonl row 2: text is an integer, not text",
        "rows.jsonl row 3: the text contains a lone surrogate, which is not valid Unicode",
        "rows.jsonl row 4: is not valid JSON: Expecting value at column 1",
        "rows.jsonl row 5: has the key b twice",
    ]
    lines = refused(tiny_8bit_dir, export, tmp_path, "text\n" + '""\n' * 500)
    assert len(lines) == 22 and "500 rows cannot be answered" in lines[20]


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("txt\na\n", {}, "has no column text (data.text_column), did you mean txt?; its columns"),
        ("text,answer\na,b\n", {}, "has the column 'answer' already"),
        ("text,probability_fox\na,b\n", {}, "has the column 'probability_fox' already"),
        ('{"text": "a"}\n{"text": "a", "confidence": 1}\n', {"name": "r.jsonl"}, "'confidence'"),
        ("text,b,b\na,1,2\n", {}, "has repeated column names: b"),
        ("text\n", {}, "has no rows"),
        ("", {}, "is empty"),
        ("text,n\na,b,c\n", {}, "row 1: has 3 cells on line 2, but the header has 2"),
        ("text\na\n", {"output": "a.xlsx"}, "the suffix .xlsx is not supported; use one of .csv"),
        ("text\na\n", {"output": "a.csv.gz"}, "the suffix .gz is not supported"),
        ("text\na\n", {"output": "rows.csv"}, "is the input"),
        ("text\na\n", {"output": "none/a.csv"}, "the folder"),
        ("text\na\n", {"name": "rows.zip"}, "unpack it first"),
        (b"PAR1", {"name": "rows.parquet"}, "is not a Parquet file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_invalid_files_are_refused(exports, tiny_8bit_dir, tmp_path, content, options, reason):
    lines = refused(tiny_8bit_dir, exports["classification"], tmp_path, content, **options)
    assert reason in lines[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--row", "text=a"], "give either --input, or --row, or a prompt"),
        (["a prompt"], "give either --input, or --row, or a prompt"),
        (["--temperature", "1"], "needs --seed"),
        (["--adapter", "none"], "--input needs a fine-tuned model"),
        (["--adapter", "nowhere"], "--adapter nowhere does not exist"),
        (["--input", "."], "--input . is not a regular file"),
        (["--input", "/dev/null"], "--input /dev/null is not a regular file"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "5000"], "leaves no room for a prompt"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(exports, tiny_8bit_dir, tmp_path, arguments, reason):
    export = exports["classification"]
    assert reason in refused(tiny_8bit_dir, export, tmp_path, "text\na\n", *arguments)[0]


def test_input_and_output_belong_together(exports, tiny_8bit_dir, tmp_path):
    for name in ("--input", "--output"):
        with pytest.raises(UserError, match="belong together"):
            generate(tiny_8bit_dir, exports["classification"], name, tmp_path / "rows.csv")


def test_answers_of_invalid_rows_can_be_left_empty(exports, tiny_8bit_dir, tmp_path, alone, capsys):
    cells = [*texts(COUNT)]
    cells[3] = cells[20] = ""
    pd.DataFrame({"n": range(COUNT), "text": cells}).to_csv(tmp_path / "rows.csv", index=False)
    files = ["--input", tmp_path / "rows.csv", "--output", tmp_path / "a.csv"]
    generate(tiny_8bit_dir, exports["classification"], *files, "--allow-invalid")
    rows = read_answers(tmp_path / "a.csv")
    assert [row["n"] for row in rows] == [str(n) for n in range(COUNT)]
    for number, row in enumerate(rows):
        if number in (3, 20):
            assert [row[name] for name in ADDED] == [""] * len(ADDED)
        else:
            assert row["answer"] == alone[number][0]
    shown = capsys.readouterr().err
    assert "warning: " in shown and "rows.csv row 4: text is empty" in shown


def test_truncated_rows_are_counted(exports, tiny_8bit_dir, tmp_path, capsys):
    long = "lazy dog " * 80
    (tmp_path / "rows.csv").write_text(f"text\nthe fox\n{long}\n")
    files = ["--input", tmp_path / "rows.csv", "--output", tmp_path / "a.csv"]
    generate(tiny_8bit_dir, exports["classification"], *files)
    assert "the texts of 1 row are too long and were truncated" in capsys.readouterr().err
    assert read_answers(tmp_path / "a.csv")[1]["text"] == long


def test_an_existing_output_is_replaced_only_by_a_complete_one(
    exports, tiny_8bit_dir, tmp_path, monkeypatch
):
    write_csv(tmp_path / "rows.csv")
    (tmp_path / "a.csv").write_text("before")
    files = ["--input", tmp_path / "rows.csv", "--output", tmp_path / "a.csv"]
    write = answering._write

    def interrupted(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_8bit_dir, exports["classification"], *files)
    assert (tmp_path / "a.csv").read_text() == "before"
    monkeypatch.setattr(answering, "_write", write)
    generate(tiny_8bit_dir, exports["classification"], *files)
    assert len(read_answers(tmp_path / "a.csv")) == COUNT


def test_an_input_that_changes_meanwhile_is_refused(exports, tiny_8bit_dir, tmp_path, monkeypatch):
    write_csv(tmp_path / "rows.csv")
    files = ["--input", tmp_path / "rows.csv", "--output", tmp_path / "a.csv"]
    answer_all = answering._answer_all

    def change(*arguments):
        answer_all(*arguments)
        shutil.copy(tmp_path / "rows.csv", tmp_path / "copy.csv")
        with open(tmp_path / "rows.csv", "a", newline="") as stream:
            csv.writer(stream).writerow([99, "the fox", ""])

    monkeypatch.setattr(answering, "_answer_all", change)
    with pytest.raises(UserError, match="has changed meanwhile"):
        generate(tiny_8bit_dir, exports["classification"], *files)
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(
    exports, tiny_8bit_dir, tmp_path, monkeypatch
):
    """Everything but the model: rows are read, checked, answered and written window by window."""
    monkeypatch.setattr(answering, "WINDOW", 64)
    answer = RowAnswer("fox", 0.5, (0.5, 0.25, 0.25))
    monkeypatch.setattr(Questions, "ask", lambda self, prompts, places: [answer] * len(prompts))

    def peak(rows, suffix):
        source, output = tmp_path / "rows.csv", tmp_path / f"a{suffix}"
        source.write_text("text,more\n" + f"the fox,{'x' * 10_000}\n" * rows)
        tracemalloc.start()
        generate(tiny_8bit_dir, exports["classification"], "--input", source, "--output", output)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    for suffix in (".csv", ".parquet"):
        peak(10, suffix)
        assert peak(1500, suffix) < peak(500, suffix) + (1 << 20)  # 10 MB more to read
