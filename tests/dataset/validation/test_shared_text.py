"""Rows are compared by what is particular to them."""

from __future__ import annotations

import json

import pytest

from gptj8.dataset.prepared.dataset import SPLITS
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from gptj8.dataset.validation.shared_text import SharedText
from gptj8.params.sections import Data
from tests.helpers.labelled_rows import byte_tokenizer, sentences

LONG = "You are a helpful assistant for the customers of a small shop. Answer in one sentence. " * 4
ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer(), eos_id=0)


def check(folder, encoder, rows, test=None, **data):
    folder.mkdir(exist_ok=True)
    params = {"task": "completion", "max_length": 2048, **data}
    for name, part in (("train", rows), ("test", test)):
        if part is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
            params[name] = str(folder / f"{name}.jsonl")
    out = folder / "out"
    out.mkdir()
    return validate(Data(**params), encoder, out)


def chat(question, answer, **more):
    messages = [
        {"role": "system", "content": LONG},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **more}


KINDS = {
    "system message": (chat, {"prompt_template": "{messages}"}),
    "instruction": (
        lambda q, a: {"instruction": LONG, "input": q, "completion": a},
        {"prompt_template": ALPACA},
    ),
    "words of the template": (
        lambda q, a: {"question": q, "hint": "", "completion": a},
        {"prompt_template": f"{{question}}\n{LONG}\n{{hint}}", "optional_columns": ("hint",)},
    ),
    "instruction in the prompt": (
        lambda q, a: {"prompt": f"{LONG}\nQuestion: {q}\nAnswer:", "completion": a},
        {"prompt_template": "{prompt}"},
    ),
    "beginning of the prompt": (
        lambda q, a: {"prompt": f"{LONG}{q}", "completion": a},
        {"prompt_template": "{prompt}"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_rows_share_makes_none_alike(tmp_path, encoder, kind):
    row, params = KINDS[kind]
    questions = sentences(48)
    rows = [row(f"{question}?", f"{question[::-1]}.") for question in questions]
    validated = check(tmp_path / "all", encoder, rows, **params)
    assert validated.problems == [] and validated.findings.checks() == []
    assert [validated.rows[name] for name in SPLITS] == [38, 5, 5]
    # Train and test are judged by the same.
    validated = check(tmp_path / "two", encoder, rows[:36], rows[36:], **params)
    assert validated.problems == []
    # A question that differs in one word is found.
    changed = row(questions[3].replace(" ", " again ", 1) + "?", "x")
    validated = check(tmp_path / "leak", encoder, rows[:36], [*rows[36:], changed], **params)
    (problem,) = validated.problems
    assert problem.startswith("near-duplicate texts are in two splits (1 in train and test)")


def test_several_instructions_are_shared_too(tmp_path, encoder):
    questions = sentences(60)
    rows = [
        {"instruction": f"{LONG}{number % 4}", "input": question, "completion": "x"}
        for number, question in enumerate(questions)
    ]
    validated = check(tmp_path, encoder, rows, prompt_template=ALPACA)
    assert validated.problems == [] and validated.findings.checks() == []


def test_rows_without_anything_particular_are_compared_as_they_are(tmp_path, encoder):
    rows = [
        {"instruction": f"{LONG}{number % 2}", "input": "", "completion": str(number)}
        for number in range(40)
    ]
    rows += [{"instruction": text, "input": "", "completion": "x"} for text in sentences(30)]
    validated = check(tmp_path, encoder, rows, prompt_template=ALPACA)
    assert validated.findings.count("conflict") == 40


def test_shared_text_is_what_recurs():
    rows = [[f"rules:\nrow {number}\nrules: end"] for number in range(20)]
    shared = SharedText.of(rows)
    assert shared.lines == {"rules:", "rules: end"}
    assert shared.particular(["rules:\nown\nrules: end"]) == "own"
    assert shared.particular(["rules:"]) == "rules:"
    few = SharedText.of(rows[:9])
    assert few == SharedText() and few.particular(["a", "b"]) == "a\nb"
    ends = SharedText.of([[f"{'begin ' * 9}{number}{' end' * 9}"] for number in range(20)])
    assert ends.particular([f"{'begin ' * 9}a{' end' * 9}"]) == "a"
    assert ends.particular(["begin a"]) == "begin a"
    columns = SharedText.of([[f"kind {number % 2}", f"own {number}"] for number in range(60)])
    assert columns.parts == {0} and columns.particular(["new kind", "x"]) == "x"
    messages = SharedText.of([["be brief", f"m{number}"] for number in range(60)], True)
    assert messages.messages == {"be brief"} and messages.particular(["m1", "be brief"]) == "m1"


def test_copies_of_one_text_are_alike_however_many_there_are(tmp_path, encoder):
    mail = sentences(20)[12:]
    for count in (8, 12, 30):
        rows = [
            {"text": "\n".join(sentences(8 * n + 8)[8 * n :]), "label": "xy"[n % 2]}
            for n in range(200)
        ]
        for number in range(count):
            lines = [*mail[:3], f"Order {number}", *mail[4:]]
            rows.append({"text": "\n".join(lines), "label": "x"})
        params = {"task": "classification", "prompt_template": "{text}"}
        validated = check(tmp_path / str(count), encoder, rows, **params)
        assert validated.findings.count("near_duplicate") == count - 1
