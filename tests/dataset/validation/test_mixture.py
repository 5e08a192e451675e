"""Weights of files: how often their training rows are used."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.labelled_rows import byte_tokenizer, pairs, sentences, write_csv


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(byte_tokenizer(), eos_id=0)


@pytest.fixture
def folder(tmp_path):
    rows = pairs(900, ("x", "y"))
    (tmp_path / "data" / "web").mkdir(parents=True)
    write_csv(tmp_path / "data" / "faq.csv", rows[:100])
    write_csv(tmp_path / "data" / "web" / "a.csv", rows[100:500])
    write_csv(tmp_path / "data" / "other.csv", rows[500:])
    return tmp_path / "data"


def check(folder, encoder, weights, **data):
    out = folder.parent / f"out{len(list(folder.parent.iterdir()))}"
    out.mkdir()
    params = {"train": str(folder), "train_weights": weights, **data}
    validated = validate(Data(**params), encoder, out)
    assert validated.problems == []
    return validated, load_prepared(out)


def test_rows_are_used_as_often_as_their_file_says(folder, encoder):
    _, once = check(folder, encoder, None)
    weights = {"faq.csv": 2.5, "web/*": 0.25}
    validated, mixed = check(folder, encoder, weights)
    before, after = (Counter(p.split("train")["file"]) for p in (once, mixed))
    faq, web, other = ((folder / name).as_posix() for name in ("faq.csv", "web/a.csv", "other.csv"))
    assert after[other] == before[other]
    assert after[faq] / before[faq] == pytest.approx(2.5, abs=0.15)
    assert after[web] / before[web] == pytest.approx(0.25, abs=0.08)
    copies = Counter(zip(mixed.split("train")["file"], mixed.split("train")["row"], strict=True))
    assert {count for (file, _), count in copies.items() if file == faq} == {2, 3}
    for name in SPLITS[1:]:
        pd.testing.assert_frame_equal(once.split(name), mixed.split(name))
    assert len(mixed.examples("train")) == after.total() == validated.rows["train"]
    for example in mixed.examples("train"):  # the row that an example names is its own
        text = mixed.split("train")["text"][example["source_row"]]
        ids = example["input_ids"][: len(encoder.encode(text))]
        assert ids == encoder.encode(text)
    assert validated.notes == [
        f"faq.csv: {before[faq]} training rows used {after[faq]} times (weight 2.5)",
        f"web/*: {before[web]} training rows used {after[web]} times (weight 0.25)",
    ]


def test_a_weight_of_zero_leaves_a_file_out(folder, encoder):
    _, mixed = check(folder, encoder, {"web/*": 0})
    assert not any("web" in file for file in mixed.split("train")["file"])


def test_weights_of_running_text(tmp_path, encoder):
    (tmp_path / "data").mkdir()
    for name, part in (("a", sentences(60)[:30]), ("b", sentences(60)[30:])):
        (tmp_path / "data" / f"{name}.txt").write_text("\n\n".join(part))
    weights = {"a.txt": 2}
    params = {"task": "text", "text_row": "paragraph", "max_length": 64}
    _, mixed = check(tmp_path / "data", encoder, weights, **params)
    stream = [i for example in mixed.examples("train") for i in example["input_ids"]]
    rows = mixed.split("train")
    for file, found in rows.groupby("file"):
        assert found["row"].value_counts().unique().tolist() == ([2] if "a.txt" in file else [1])
    # Each copy is a text of its own.
    twice = rows[rows["file"].str.endswith("a.txt")]["text"]
    expected = [i for text in twice for i in (*encoder.encode(text), encoder.eos_id)]
    assert stream[: len(expected)] == expected


def test_a_pattern_that_matches_nothing_is_refused(folder, encoder):
    with pytest.raises(UserError, match=r"no training file matches fqa\.csv; the files: 'faq"):
        check(folder, encoder, {"fqa.csv": 2})


def test_the_choice_of_rows_depends_on_their_text_alone(folder, encoder):
    _, first = check(folder, encoder, {"*": 0.5})
    rows = pd.concat([pd.read_csv(folder / name) for name in ("faq.csv", "other.csv")])
    rows.sample(frac=1, random_state=3).to_csv(folder / "faq.csv", index=False)
    (folder / "other.csv").unlink()
    _, second = check(folder, encoder, {"*": 0.5})
    assert np.array_equal(*(np.sort(p.split("train")["text"]) for p in (first, second)))


def test_a_later_pattern_wins_and_a_label_without_rows_is_a_problem(folder, encoder):
    validated, _ = check(folder, encoder, {"*": 0.5, "faq.csv": 2})
    assert [note.partition(" used")[0].partition(":")[0] for note in validated.notes] == [
        "*",
        "faq.csv",
    ]
    out = folder.parent / "none"
    out.mkdir()
    data = Data(train=str(folder), train_weights={"*": 0})
    problems = validate(data, encoder, out).problems
    assert any("train" in problem for problem in problems)
