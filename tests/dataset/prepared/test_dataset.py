"""Tests of held-out splits and of the prepared dataset on disk."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.sources import content_key
from gptj8.dataset.validation.relations import hold_out
from gptj8.runtime.errors import UserError
from gptj8.runtime.manifest import write_manifest
from tests.helpers.prepared_dataset import write_prepared


def labelled(count: int, labels: int, seed: int = 0) -> pd.DataFrame:
    random.seed(seed)
    texts = [f"text {random.random()}" for _ in range(count)]
    return pd.DataFrame({"text": texts, "label": [f"label {i % labels}" for i in range(count)]})


def held_out(rows: pd.DataFrame, **shares: float) -> dict[str, pd.DataFrame]:
    keys = [content_key(text) for text in rows["text"]]
    high = np.array([int.from_bytes(key[:8]) for key in keys], np.uint64)
    cluster = pd.factorize(pd.Series(keys))[0]
    numbers = {SPLITS.index(name): share for name, share in shares.items()}
    split = hold_out(high, cluster, pd.factorize(rows["label"], sort=True)[0], numbers)
    return {name: rows[split == SPLITS.index(name)] for name in ("train", *shares)}


def test_hold_out_keeps_clusters_together_and_large_clusters_in_train() -> None:
    rows = labelled(100, 1)
    high = np.arange(100, dtype=np.uint64)
    cluster = np.concatenate([np.zeros(40), np.repeat(np.arange(1, 31), 2)]).astype(int)
    split = hold_out(high, cluster, None, {2: 0.1, 1: 0.2})
    assert Counter(split.tolist()) == {0: 70, 1: 20, 2: 10}
    assert all(len(set(split[cluster == number])) == 1 for number in range(31))
    assert set(split[:40]) == {0}
    assert len(rows) == len(split)


def test_hold_out_takes_exact_shares_of_each_label() -> None:
    splits = held_out(labelled(300, 3), test=0.2, validation=0.1)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 210,
        "test": 60,
        "validation": 30,
    }
    assert set(Counter(splits["test"]["label"]).values()) == {20}


def test_hold_out_takes_the_lowest_hashes() -> None:
    rows = labelled(50, 1)
    ranked = sorted(rows["text"], key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    splits = held_out(rows, test=0.2, validation=0.1)
    assert set(splits["test"]["text"]) == set(ranked[:10])
    assert set(splits["validation"]["text"]) == set(ranked[10:15])


def test_hold_out_does_not_depend_on_row_order() -> None:
    rows = labelled(100, 4)
    once = held_out(rows, test=0.15, validation=0.1)
    again = held_out(rows.sample(frac=1, random_state=3), test=0.15, validation=0.1)
    for name in once:
        assert set(once[name]["text"]) == set(again[name]["text"])


def test_hold_out_keeps_copies_with_different_labels_together() -> None:
    rows = labelled(40, 2)
    copies = rows.assign(text="  " + rows["text"] + "\n", label=rows["label"].iloc[::-1].values)
    splits = held_out(pd.concat([rows, copies], ignore_index=True), test=0.2, validation=0.2)
    keys = {name: set(part["text"].map(content_key)) for name, part in splits.items()}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["test"] & keys["validation"]
    assert sum(map(len, splits.values())) == 80


@pytest.mark.parametrize("count", range(1, 12))
def test_hold_out_of_few_rows_keeps_every_label_in_train(count: int) -> None:
    splits = held_out(labelled(2 * count, 2), test=0.49, validation=0.49)
    assert set(splits["train"]["label"]) == {"label 0", "label 1"}
    expected = 2 if count >= 3 else 0
    assert splits["test"]["label"].nunique() == expected
    assert splits["validation"]["label"].nunique() == expected


def test_new_validation_share_does_not_change_the_test_split() -> None:
    rows = labelled(100, 2)
    tests = [held_out(rows, test=0.1, validation=share)["test"] for share in (0.1, 0.3)]
    pd.testing.assert_frame_equal(*tests)


def prepared(directory: Path) -> dict[str, pd.DataFrame]:
    rows = labelled(12, 2).assign(file="mine.csv", row=range(1, 13))
    splits = dict(zip(SPLITS, (rows[:8], rows[8:10], rows[10:]), strict=True))
    write_prepared(directory, "classification", splits, "{text}:")
    return splits


def test_prepared_dataset_round_trip(tmp_path: Path) -> None:
    splits = prepared(tmp_path / "dataset")
    dataset = load_prepared(tmp_path / "dataset")
    assert dataset.task == "classification"
    assert dataset.labels == ("label 0", "label 1")
    assert dataset.rows == {"train": 8, "validation": 2, "test": 2}
    assert dataset.prompt_template == "{text}:"
    assert [dict(example) for example in dataset.examples("validation")] == [
        {
            "input_ids": [1, 2, 3],
            "learned": [1, 3],
            "length": 3,
            "learned_tokens": 2,
            "source_row": number,
        }
        for number in range(2)
    ]
    with pytest.raises(ValueError, match="'test' is not one of"):
        dataset.examples("test")
    for name in SPLITS:
        rows = dataset.split(name)
        assert list(rows.columns) == ["text", "label", "file", "row"]
        assert rows.values.tolist() == splits[name][list(rows.columns)].values.tolist()
    with pytest.raises(ValueError, match="'dev' is not one of"):
        dataset.split("dev")


def test_prompt_encoder_uses_the_stored_template(tmp_path: Path, tiny_model_dir: Path) -> None:
    encoder = TextEncoder.load(tiny_model_dir)
    prepared(tmp_path)
    prompts = load_prepared(tmp_path).prompt_encoder(encoder, 12)
    ids = prompts.prompt("the quick brown fox jumps over the lazy dog" * 3, 4).ids
    assert len(ids) == 8
    assert encoder.decode(ids).startswith("the quick") and encoder.decode(ids).endswith(":")


def test_equal_rows_give_byte_identical_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepared(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_missing_or_damaged_prepared_dataset_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_prepared(tmp_path)
    prepared(tmp_path / "dataset")
    opened = load_prepared(tmp_path / "dataset")
    (tmp_path / "dataset" / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"test\.parquet cannot be read"):
        opened.split("test")
    (tmp_path / "dataset" / "train.arrow").write_bytes(b"ARROW")
    with pytest.raises(UserError, match=r"train\.arrow cannot be read"):
        opened.examples("train")
    with pytest.raises(UserError, match=r"(?s)test\.parquet was altered.*train\.arrow was altered"):
        load_prepared(tmp_path / "dataset")
    (tmp_path / "dataset" / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest; rerun validate"):
        load_prepared(tmp_path / "dataset")
    (tmp_path / "dataset" / "dataset.json").write_text("[]")
    write_manifest(tmp_path / "dataset")
    with pytest.raises(UserError, match="was not written by validate"):
        load_prepared(tmp_path / "dataset")
