"""Conversations from files to training examples, and what is said about what is not used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.dataset.prepared.examples import learned_spans
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.chat_templates import REASONING, TEMPLATES
from tests.helpers.labelled_rows import sentences
from tests.helpers.tokenizer_families import write_family

PLAIN = {"task": "completion", "prompt_template": "{messages}\nassistant:"}


@pytest.fixture(scope="module")
def chat_encoder(tmp_path_factory):
    folder = write_family("smollm", tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATES["smollm2"][1])
    return TextEncoder.load(folder)


@pytest.fixture(scope="module")
def base_encoder(tmp_path_factory):
    return TextEncoder.load(write_family("gpt2", tmp_path_factory.mktemp("base")))


class Result:
    def __init__(self, folder: Path, rows: list[dict], encoder: TextEncoder, **data) -> None:
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"near_duplicate_threshold": None, "max_length": 512, **PLAIN, **data}
        out = folder / "dataset"
        out.mkdir()
        self.validated = validate(Data(train=str(file), **settings), encoder, out)
        if self.validated.problems:
            raise UserError("\n".join(self.validated.problems))
        self.dataset = load_prepared(out)
        self.rows = pd.concat([self.dataset.split(n) for n in ("train", "validation", "test")])
        decode = lambda ids: encoder._tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
        self.examples = [
            (decode(e["input_ids"]), [decode(e["input_ids"][s]) for s in learned_spans(e)])
            for e in self.dataset.examples("train")
        ]

    def reasons(self, check: str) -> set[str]:
        frame = self.validated.findings.frame()
        return set(frame.loc[frame["check"] == check, "reason"])


def asked(count: int) -> list[str]:
    return [f"{text}?" for text in sentences(count)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def test_code_keeps_its_indentation(tmp_path, base_encoder):
    rows = [
        {"prompt": f"def f{n}(a, b):", "completion": f"\n    x = a + {n}\n    return x * b\n"}
        for n in range(20)
    ]
    result = Result(tmp_path, rows, base_encoder, prompt_template="{prompt}")
    for text, (learned,) in result.examples:
        assert learned.startswith("\n    x = a + ")
        assert learned.endswith("\n    return x * b\n<|endoftext|>")
        assert "):\n    x = a" in text
    assert list(result.rows["completion"].str[:5].unique()) == ["\n    "]
    assert not result.reasons("seam")


def test_a_token_of_both_prompt_and_completion_is_a_finding(tmp_path, base_encoder):
    rows = [{"prompt": f"f{n}:\n", "completion": f"    a + {n}"} for n in range(20)]
    result = Result(tmp_path, rows, base_encoder, prompt_template="{prompt}")
    (reason,) = result.reasons("seam")
    assert reason.startswith("shares the token '\\n ")
    for _, (learned,) in result.examples:
        assert learned.startswith("\n    a + ")
    # The prompt alone has another token there.
    prompts = result.dataset.prompt_encoder(base_encoder, 512)
    text, answer = rows[0]["prompt"], rows[0]["completion"]
    example = prompts.example(text, answer)
    assert prompts.prompt(text, 8).ids != example.ids[: example.prompt_length]


def test_all_answers_are_learned(tmp_path, chat_encoder):
    questions = asked(60)
    rows = [
        {"messages": [user(a), assistant("Fine."), user(b), assistant("Good bye.")]}
        for a, b in zip(questions[::2], questions[1::2], strict=True)
    ]
    result = Result(tmp_path, rows, chat_encoder)
    for text, learned in result.examples:
        assert learned == ["Fine.<|im_end|>", "Good bye.<|im_end|>"]
        assert text.startswith("<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n")
    last = tmp_path / "last"
    last.mkdir()
    result = Result(last, rows, chat_encoder, learn="last")
    assert {tuple(learned) for _, learned in result.examples} == {("Good bye.<|im_end|>",)}


def test_fields_that_are_not_read_are_findings(tmp_path, base_encoder):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows = [
        {
            "messages": [
                user(question),
                assistant("One.", reasoning_content="Hm.", tool_calls=[call], weight=n % 2),
                user("And?"),
                assistant("Two.", weight=1),
            ],
            "tools": [{"name": "f"}],
        }
        for n, question in enumerate(asked(24))
    ]
    result = Result(tmp_path, rows, base_encoder)
    (reason,) = result.reasons("unread_fields")
    assert reason.endswith("does not read: reasoning_content, tools")
    assert result.validated.findings.count("unread_fields") == 24
    counts = {len(learned) for _, learned in result.examples}
    assert counts == {1, 2}  # an answer of weight 0 is not learned
    assert all('One.\n{"name": "f", "arguments": {}}' in text for text, _ in result.examples)
    none = [{"messages": [user(q), assistant("One.", weight=0)]} for q in asked(24)]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="row 1: messages has no answer to learn: each has the"):
        Result(tmp_path / "none", none, base_encoder)


def test_text_parts_and_roles(tmp_path, chat_encoder):
    rows = [
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": question}]},
                {"role": "function_call", "content": "not JSON"},
                {"role": "observation", "content": "4"},
                {"role": "model", "content": [{"type": "text", "text": "It is 4."}]},
            ]
        }
        for question in asked(24)
    ]
    result = Result(tmp_path, rows, chat_encoder)
    for text, learned in result.examples:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>" in text
        assert learned == ["not JSON<|im_end|>", "It is 4.<|im_end|>"]


def test_an_answer_before_the_first_question_is_not_learned(tmp_path, chat_encoder):
    rows = [
        {"messages": [assistant("Hello."), user(question), assistant("Fine.")], "system": "Be."}
        for question in asked(24)
    ]
    result = Result(tmp_path, rows, chat_encoder)
    assert {tuple(learned) for _, learned in result.examples} == {("Fine.<|im_end|>",)}
    assert result.reasons("unanswered") == {"begins with an answer, which is not learned"}
    assert all("<|im_start|>assistant\nHello." in text for text, _ in result.examples)


def test_null_fields_of_parquet_are_left_out(tmp_path, tmp_path_factory):
    folder = write_family("qwen2", tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen2"][1])
    encoder = TextEncoder.load(folder)

    def row(question):
        calls = [
            {"id": "1", "function": {"name": "f", "arguments": {"city": "P"}}},
            {"id": "2", "function": {"name": "g", "arguments": {"query": "z"}}},
        ]
        tools = [
            {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}},
            {"name": "g", "parameters": {"properties": {"query": {"type": "string"}}}},
        ]
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"messages": [user(question), answer], "tools": tools}

    rows = [row(question) for question in asked(24)]
    out = tmp_path / "jsonl"
    out.mkdir()
    expected = Result(out, rows, encoder).examples
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = Data(
        train=str(tmp_path / "rows.parquet"),
        near_duplicate_threshold=None,
        max_length=512,
        **PLAIN,
    )
    (tmp_path / "parquet").mkdir()
    validate(data, encoder, tmp_path / "parquet")
    examples = load_prepared(tmp_path / "parquet").examples("train")
    decoded = [encoder.decode(example["input_ids"]) for example in examples]
    assert len(decoded) == len(expected) > 15
    for text in decoded:
        assert '<call>{"name": "f", "arguments": {"city": "P"}}</call>' in text
        assert "null" not in text


def test_a_long_conversation_keeps_its_beginning(tmp_path, chat_encoder):
    rng = random.Random(0)
    rows = []
    for question in asked(24):
        messages = [{"role": "system", "content": "Answer as a pirate."}, user(question)]
        for turn in range(6):
            messages += [assistant(f"Aye {turn}."), user(" ".join(rng.choices(asked(9), k=2)))]
        rows.append({"messages": messages})
    result = Result(tmp_path, rows, chat_encoder, max_length=120)
    for text, learned in result.examples:
        assert text.startswith("<|im_start|>system\nAnswer as a pirate.<|im_end|>")
        assert learned[0] == "Aye 0.<|im_end|>" and text.endswith(learned[-1])
        assert len(learned) < 6
    assert result.validated.findings.count("truncated") == 24
    assert all(r.startswith("loses its end after answer ") for r in result.reasons("truncated"))
    assert result.reasons("unanswered") == {"ends with 1 message after the last answer to learn"}
    # The row is what is left of it, also for the evaluation.
    for row in result.rows.itertuples():
        messages = json.loads(row.conversation)["messages"]
        assert row.completion == messages[-1]["content"]


def test_rewritten_answers(tmp_path, tmp_path_factory):
    folder = write_family("qwen2", tmp_path_factory.mktemp("rewriting"))
    (folder / "chat_template.jinja").write_text(REASONING)
    rows = [
        {
            "messages": [
                user(question),
                assistant("One.", reasoning_content="Hm."),
                user("And?"),
                assistant("Two.", reasoning_content="So."),
            ]
        }
        for question in asked(24)
    ]
    result = Result(tmp_path, rows, TextEncoder.load(folder))
    assert result.validated.rewritten_rows == 24
    train = result.dataset.examples("train")
    assert len(train) == 2 * result.dataset.rows["train"]
    assert train["source_row"] == [n for n in range(result.dataset.rows["train"]) for _ in "12"]
    assert [learned for _, learned in result.examples[:2]] == [
        ["<think>\nHm.\n</think>\n\nOne.<|im_end|>"],
        ["<think>\nSo.\n</think>\n\nTwo.<|im_end|>"],
    ]


def test_a_role_that_the_template_refuses(tmp_path, tmp_path_factory):
    folder = write_family("gemma", tmp_path_factory.mktemp("gemma"))
    (folder / "chat_template.jinja").write_text(TEMPLATES["gemma"][1])
    encoder = TextEncoder.load(folder)
    rows = [{"messages": [user(q), assistant("Fine.")]} for q in asked(40)]
    rows[6]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    result = Result(tmp_path, rows, encoder)
    frame = result.validated.findings.frame()
    (found,) = frame[frame["check"] == "messages"].itertuples()
    assert (found.row, found.dropped) == (7, True)
    assert found.reason == "is refused by the model's chat template: there is no system role"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("missing.jinja", "data.chat_template = missing.jinja does not exist; name a file"),
        ("raises.jinja", "a question with an answer is refused by data.chat_template = "),
        ("broken.jinja", "broken.jinja is not a Jinja template: "),
        ("chatml.jinja", r"writes <\|im_end\|> after an answer, which is not a special token"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, monkeypatch, base_encoder, template, reason):
    monkeypatch.chdir(tmp_path)
    Path("raises.jinja").write_text("{{ raise_exception('no') }}")
    Path("broken.jinja").write_text("{% for message in messages %}")
    Path("chatml.jinja").write_text(TEMPLATES["chatml"][1])
    rows = [{"messages": [user(q), assistant("Fine.")]} for q in asked(20)]
    with pytest.raises(UserError, match=reason) as error:
        Result(tmp_path, rows, base_encoder, chat_template=template)
    assert "\n" not in str(error.value)
