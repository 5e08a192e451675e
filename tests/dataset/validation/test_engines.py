"""Tests of the Dask engine: the prepared dataset is byte-identical to that of one process."""

from __future__ import annotations

import csv
import gzip
import pickle
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster

from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from tests.helpers.labelled_rows import byte_tokenizer, pairs


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return TextEncoder(tokenizer, eos_id=0)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return six files with duplicates and near-duplicates across them, and invalid rows."""
    rows = pairs(300)
    rows[40] = [rows[3][0], rows[3][1]]
    rows[90] = [rows[200][0].upper() + "!", rows[200][1]]
    rows[120], rows[180] = ["", "ham"], ["a <|endoftext|> b &amp; c", "ham"]
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(6):
        with gzip.open(folder / f"{number}.csv.gz", "wt", newline="") as stream:
            part = rows[number * 50 : number * 50 + 50]
            csv.writer(stream).writerows([["text", "label"], *part])
    return folder


def result(data: Data, encoder: TextEncoder, directory: Path) -> dict[str, bytes]:
    directory.mkdir()
    validated = validate(data, encoder, directory)
    assert not validated.problems and validated.total_rows == {"train": 300}
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_dask_gives_the_same_dataset_as_one_process(shards: Path, encoder: TextEncoder) -> None:
    local = result(Data(train=str(shards)), encoder, shards.parent / "local")
    data = Data(train=str(shards), engine="dask")
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        dask.config.set({"scheduler-address": cluster.scheduler_address}),
    ):
        assert result(data, encoder, shards.parent / "dask") == local
        (shards / "2.csv.gz").write_bytes(b"no gzip")
        (shards / "4.csv.gz").write_bytes(gzip.compress(b'text,label\n"a" b,c\n'))
        with pytest.raises(UserError) as caught:
            validate(data, encoder, shards.parent)
    problems = str(caught.value).splitlines()
    assert len(problems) == 2
    assert "2.csv.gz cannot be decompressed" in problems[0]
    assert "4.csv.gz line 2 column 4" in problems[1]
    assert {"train.parquet", "findings.parquet", "train.arrow"} <= set(local)


def test_unreachable_cluster_raises(shards: Path, encoder: TextEncoder) -> None:
    address = {"scheduler-address": "tcp://127.0.0.1:9", "distributed.comm.timeouts.connect": "1s"}
    with (
        dask.config.set(address),
        pytest.raises(UserError, match=r"127\.0\.0\.1:9.*cluster running"),
    ):
        validate(Data(train=str(shards), engine="dask"), encoder, shards.parent)


def test_pickled_encoder_encodes_special_tokens_as_text(
    encoder: TextEncoder,
) -> None:
    sent = pickle.loads(pickle.dumps(encoder))
    text = "a <|endoftext|> b"
    assert sent.encode(text) == encoder.encode(text)
    assert sent.eos_id not in sent.encode(text)
    assert sent.special_tokens == encoder.special_tokens == ("<|endoftext|>",)
