"""Files in the layouts of public datasets, with invented words: GLUE, SuperGLUE, instructions,
conversations and SQuAD. `test_text_layouts` has more.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import decoders

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.labelled_rows import byte_tokenizer

SYLLABLES = "ba de fi go lu mi no ra se ti vo xu zan kel dor pim".split()


def text_encoder() -> TextEncoder:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return TextEncoder(tokenizer, eos_id=0)


class Read:
    """The rows of a prepared dataset, with the notes and the findings."""

    def __init__(self, train: Path, **params) -> None:
        with tempfile.TemporaryDirectory() as out:
            self.validated = validate(Data(train=str(train), **params), text_encoder(), out)
            if self.validated.problems:
                raise UserError("\n".join(self.validated.problems))
            dataset = load_prepared(Path(out))
            splits = [dataset.split(name).assign(split=name) for name in SPLITS]
            self.findings = self.validated.findings.frame()
        self.rows = pd.concat(splits, ignore_index=True)
        self.notes = "\n".join(self.validated.notes)

    def pairs(self, *splits: str) -> list[tuple[str, str]]:
        """Return the inputs and answers of splits, in the order of the files."""
        rows = self.rows[self.rows["split"].isin(splits or SPLITS)].sort_values(["file", "row"])
        names = [name for name in ("text", "prompt", "label", "completion") if name in rows]
        return list(rows[names].itertuples(index=False, name=None))


def refusal(train: Path, **params) -> str:
    """Return the one line with which a dataset is refused."""
    with pytest.raises(UserError) as error:
        Read(train, **params)
    assert "\n" not in str(error.value)
    return str(error.value)


def texts(count: int, seed: int = 0, words: int = 8) -> list[str]:
    """Return distinct texts of invented words."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))

    return [f"{' '.join(word() for _ in range(words))}." for _ in range(count)]


def quoted(count: int, seed: int = 0) -> list[str]:
    """Return texts with quotes that are neither balanced nor around cells."""
    shapes = ('"{}', '{} "', '"{}"', '5" {}', '"" {}', "{}", '"{}" ra', '{} "ba" de')
    return [shapes[n % len(shapes)].format(text) for n, text in enumerate(texts(count, seed))]


def write_lines(path: Path, lines, encoding: str = "utf-8", newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}{newline}" for line in lines).encode(encoding))
    return path


def write_table(path: Path, header: str, rows) -> Path:
    lines = ["\t".join(map(str, row)) for row in rows]
    return write_lines(path, [header, *lines] if header else lines)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write JSON Lines, a JSON array or Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# --- GLUE: tables with tabs, in which quotes are text ---------------------------------------------

SENTENCE = {"text_column": "sentence"}
TWO = {"prompt_template": "{sentence1}\n{sentence2}\nAnswer:"}
MNLI_HEADER = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 gold_label"
)
IS_ENTAILED = ("entailment", "not_entailment")
FOLLOWS = ("entailment", "neutral", "contradiction")


def rte_row(n: int, a: str, b: str) -> list:
    return [n, a, b, IS_ENTAILED[n % 2]]


def mnli_row(n: int, a: str, b: str) -> list:
    parses = [f"( ( {a} ) )", f"( {b} )", f"(ROOT (S {a}))", f"(ROOT (S {b}))"]
    return [n, f"{n}", f"{n}n", "travel", *parses, a, b, FOLLOWS[n % 3], FOLLOWS[n % 3]]


# The header, a row, the labels, and the params.
GLUE = {
    "CoLA": ("", lambda n, a, b: [f"ab{n % 5:02}", n % 2, "" if n % 2 else "*", a], "01", {}),
    "SST-2": ("sentence label", lambda n, a, b: [f"{a} ", n % 2], "01", SENTENCE),
    "MRPC": (
        "\ufeffQuality,#1 ID,#2 ID,#1 String,#2 String",
        lambda n, a, b: [n % 2, 700 + n, 900 + n, a, b],
        "01",
        {"label_column": "Quality", "prompt_template": "{#1 String}\n{#2 String}\nSame:"},
    ),
    "QQP": (
        "id qid1 qid2 question1 question2 is_duplicate",
        lambda n, a, b: [n, 700 + n, 900 + n, a, b, n % 2],
        "01",
        {"label_column": "is_duplicate", "prompt_template": "{question1}\n{question2}\nSame:"},
    ),
    "STS-B": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        lambda n, a, b: [n, "ra", "x", "2012", n, "none", "none", a, b, f"{n % 3 * 1.25:.3f}"],
        ("0.000", "1.250", "2.500"),
        {"label_column": "score", **TWO},
    ),
    "MNLI": (MNLI_HEADER, mnli_row, FOLLOWS, {"label_column": "gold_label", **TWO}),
    "QNLI": (
        "index question sentence label",
        rte_row,
        IS_ENTAILED,
        {"prompt_template": "{question}\n{sentence}\nAnswer:"},
    ),
    "RTE": ("index sentence1 sentence2 label", rte_row, IS_ENTAILED, TWO),
}


def write_glue(path: Path, task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Write a file of a task, and return the texts and labels that it has."""
    header, row, labels, params = GLUE[task]
    header = "\t".join(header.split("," if "," in header else " "))
    sentences = list(zip(quoted(count, seed), quoted(count, seed + 10)[::-1], strict=True))
    write_table(path, header, [row(n, a, b) for n, (a, b) in enumerate(sentences)])
    ends = {"SST-2": " "}.get(task, "")
    return [
        (f"{a}\n{b}" if "prompt_template" in params else a + ends, labels[n % len(labels)])
        for n, (a, b) in enumerate(sentences)
    ]


@pytest.mark.parametrize("task", GLUE)
def test_glue(tmp_path, task):
    folder = tmp_path / task
    train = write_glue(folder / "train.tsv", task, 48, 1)
    dev = write_glue(folder / "dev.tsv", task, 12, 2)
    found = Read(folder, max_length=512, **GLUE[task][3])
    assert (found.pairs("train", "test"), found.pairs("validation")) == (train, dev)
    assert not found.validated.invalid_rows.total()


@pytest.mark.parametrize("task", ["SST-2", "RTE"])
def test_glue_has_no_labels_for_the_test(tmp_path, task):
    folder = tmp_path / task
    train = write_glue(folder / "train.tsv", task, 48, 1)
    dev = write_glue(folder / "dev.tsv", task, 12, 2)
    columns = {"SST-2": ["sentence"], "RTE": ["sentence1", "sentence2"]}[task]
    cells = ([n, *[text] * len(columns)] for n, text in enumerate(quoted(9, 3)))
    write_table(folder / "test.tsv", "\t".join(["index", *columns]), cells)
    params = GLUE[task][3]
    assert "/test.tsv has no column label" in (message := refusal(folder, **params))
    files = {"train_files": "train.tsv", "validation_files": "dev.tsv"}
    found = Read(folder, validation=str(folder), **files, **params)
    assert (found.pairs("train", "test"), found.pairs("validation")) == (train, dev)
    assert "data.train" in message  # the way in is to name the other files


def test_cola_begins_with_sentences_of_two_sources(tmp_path):
    rows = [(f"ab0{n > 9}", n % 2, "" if n % 2 else "*", t) for n, t in enumerate(texts(40))]
    expected = [(text, str(label)) for _, label, _, text in rows]
    train = write_table(tmp_path / "train.tsv", "", rows)
    assert Read(train, column_names=("source", "label", "mark", "text")).pairs() == expected
    assert "data.column_names" in refusal(train)


def test_mnli_has_two_files_for_validation(tmp_path):
    folder = tmp_path / "MNLI"
    train = write_glue(folder / "train.tsv", "MNLI", 48, 1)
    matched = write_glue(folder / "dev_matched.tsv", "MNLI", 12, 2)
    write_glue(folder / "dev_mismatched.tsv", "MNLI", 12, 3)
    params = {"max_length": 512, **GLUE["MNLI"][3]}
    assert "may be a split" in (message := refusal(folder, **params))
    assert "set data.train_files, data.validation_files" in message
    params |= {"train_files": "train.tsv", "validation_files": "dev_matched.tsv"}
    found = Read(folder, validation=str(folder), **params)
    assert (found.pairs("train", "test"), found.pairs("validation")) == (train, matched)


# --- SuperGLUE, instructions and conversations ----------------------------------------------------


def copa_row(n: int, text: str) -> dict:
    return {"premise": text, "choice1": f"ba {n}", "choice2": "de", "question": "cause", "idx": n}


# A row without its label, the template, and the labels.
SUPERGLUE = {
    "BoolQ": (
        lambda n, text: {"question": f"ra {n}", "passage": text, "idx": n},
        "{passage}\nQuestion: {question}",
        (False, True),
    ),
    "COPA": (copa_row, "{premise}\n{question}\n1: {choice1}\n2: {choice2}", (0, 1)),
}


@pytest.mark.parametrize("task", SUPERGLUE)
def test_superglue(tmp_path, task):
    row, shape, labels = SUPERGLUE[task]
    folder = tmp_path / task
    template = {"prompt_template": f"{shape}\nAnswer:"}
    unlabelled = [row(n, text) for n, text in enumerate(texts(60))]
    rows = [{**cells, "label": labels[n % 2]} for n, cells in enumerate(unlabelled)]
    expected = [(shape.format(**cells), str(cells["label"]).lower()) for cells in rows]
    write_rows(folder / "train.jsonl", rows[:48])
    write_rows(folder / "val.jsonl", rows[48:])
    found = Read(folder, **template)
    assert (found.pairs("train", "test"), found.pairs("validation")) == (
        expected[:48],
        expected[48:],
    )
    write_rows(folder / "test.jsonl", unlabelled[:9])
    assert "/test.jsonl has no column label" in (message := refusal(folder, **template))
    assert "data.train" in message  # as above


def test_alpaca(tmp_path):
    rows = [
        {"instruction": text, "input": "" if n % 3 else f"ba {n}", "output": f"de {n}"}
        for n, text in enumerate(texts(40))
    ]
    template = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    params = {"task": "completion", "completion_column": "output", "prompt_template": template}
    expected = [
        f"{row['instruction']}\n\n### Input:\n{row['input']}"
        if row["input"]
        else row["instruction"]
        for row in rows
    ]
    found = Read(write_rows(tmp_path / "alpaca_data.json", rows), **params)
    assert found.pairs() == list(zip(expected, [row["output"] for row in rows], strict=True))


def test_dolly(tmp_path):
    rows = [
        {"instruction": t, "context": "" if n % 2 else f"ba {n}", "response": f"{t}\n\n- {n}"}
        for n, t in enumerate(texts(40))
    ]
    found = Read(
        write_rows(tmp_path / "dolly.jsonl", [{**row, "category": "open_qa"} for row in rows]),
        task="completion",
        completion_column="response",
        optional_columns=("context",),
        prompt_template="{instruction}\n\nContext: {context}\n\nAnswer:",
    )
    expected = [f"{r['instruction']}\n\nContext: {r['context']}" for r in rows]
    expected = [text.removesuffix("\n\nContext: ") for text in expected]
    assert found.pairs() == list(zip(expected, [r["response"] for r in rows], strict=True))


CHAT = {"task": "completion", "prompt_template": "{messages}"}


def test_sharegpt(tmp_path):
    def turns(text: str) -> list[dict]:
        said = [("human", text), ("gpt", "ba"), ("human", "de?"), ("gpt", f"fi {text}")]
        return [{"from": role, "value": value} for role, value in said]

    rows = [{"id": f"x{n}_0", "conversations": turns(t)} for n, t in enumerate(texts(40))]
    train = write_rows(tmp_path / "sharegpt.json", rows)
    found = Read(train, messages_column="conversations", **CHAT)
    assert [answer for _, answer in found.pairs()] == [f"fi {text}" for text in texts(40)]
    for text, (prompt, _) in zip(texts(40), found.pairs(), strict=True):
        assert prompt.index(text) < prompt.index("ba") < prompt.index("de?")
    assert "data.messages_column" in refusal(train, **CHAT)


def test_openai_tools(tmp_path):
    tool = {"name": "get_zan", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "get_zan", "arguments": '{"city": "Ra"}'}
    calls = [{"id": "call_1", "type": "function", "function": call}]
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be kel."},
                {"role": "user", "content": text},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "call_1", "content": "21"},
                {"role": "assistant", "content": f"It is {n}."},
            ],
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": tool}],
        }
        for n, text in enumerate(texts(30))
    ]
    found = Read(write_rows(tmp_path / "chat.jsonl", rows), max_length=512, **CHAT)
    assert [answer for _, answer in found.pairs()] == [f"It is {n}." for n in range(30)]
    for prompt, _ in found.pairs():
        assert '{"name": "get_zan", "arguments": {"city": "Ra"}}' in prompt
    assert set(found.findings["check"]) == {"unread_fields"}


def test_ultrachat(tmp_path):
    rows = []
    for n, text in enumerate(texts(60)):
        said = [{"content": text, "role": "user"}, {"content": f"ba {n}", "role": "assistant"}]
        rows.append({"prompt": text, "prompt_id": f"{n:064x}", "messages": said})
    folder = tmp_path / "data"
    for name, part in {"train": rows[:48], "test": rows[48:]}.items():
        write_rows(folder / f"{name}_sft-00000-of-00001.parquet", part)
    assert "train_sft-00000-of-00001.parquet may be a split" in refusal(folder, **CHAT)
    files = {"train_files": "train_sft-*", "test": str(folder), "test_files": "test_sft-*"}
    found = Read(folder, **files, **CHAT)
    answers = [f"ba {n}" for n in range(60)]
    assert [answer for _, answer in found.pairs("train", "validation")] == answers[:48]
    assert [answer for _, answer in found.pairs("test")] == answers[48:]


# --- SQuAD ----------------------------------------------------------------------------------------

SQUAD = {
    "task": "completion",
    "completion_column": "answers.text",
    "prompt_template": "{context}\n\n{question}\nAnswer:",
    "max_length": 512,
}


def squad(answers) -> tuple[list[dict], list[tuple[str, str]]]:
    """Return rows, and the prompts and answers of those that have an answer."""
    rows, expected = [], []
    for n, text in enumerate(texts(40)):
        cell = {"text": answers(n), "answer_start": [0] * len(answers(n))}
        rows.append({"id": f"{n}", "title": "Ra", "context": text, "question": f"zan {n}?"})
        rows[-1]["answers"] = cell
        expected += [(f"{text}\n\nzan {n}?", answer) for answer in cell["text"][:1]]
    return rows, expected


def test_squad_as_it_was_published(tmp_path):
    asked = {"question": "zan?", "id": "1", "answers": [{"text": "ba", "answer_start": 0}]}
    articles = [{"title": t, "paragraphs": [{"context": t, "qas": [asked]}]} for t in texts(24)]
    train = tmp_path / "train-v1.1.json"
    train.write_text(json.dumps({"data": articles, "version": "1.1"}))
    assert "paragraphs" in (message := refusal(train, **SQUAD))
    assert re.search("nested|flat|a row (for|per)", message)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_squad_of_the_hub(tmp_path, suffix):
    rows, expected = squad(lambda n: [f"ba {n}"])
    assert Read(write_rows(tmp_path / f"train{suffix}", rows), **SQUAD).pairs() == expected
    # The validation split has several answers to each question.
    rows, expected = squad(lambda n: [f"ba {n}", f"ba {n}.", f"de {n}"])
    validation = write_rows(tmp_path / f"validation{suffix}", rows)
    first = {**SQUAD, "completion_column": "answers.text.0"}
    assert Read(validation, **first).pairs() == expected
    assert "answers.text.0" in refusal(validation, **SQUAD)


@pytest.mark.parametrize("column", ["answers.text", "answers.text.0"])
def test_squad_2_has_questions_without_an_answer(tmp_path, column):
    rows, expected = squad(lambda n: [f"ba {n}"] if n % 3 else [])
    train = write_rows(tmp_path / "squad_v2.parquet", rows)
    params = {**SQUAD, "completion_column": column}
    assert "data.max_invalid_fraction" in refusal(train, **params)
    found = Read(train, **params, max_invalid_fraction=0.5)
    assert found.pairs() == expected
    assert found.findings["dropped"].all()
    assert set(found.findings["reason"]) <= {"is missing", "is empty", "is an empty list"}
