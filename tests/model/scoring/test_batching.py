"""Batches contain every row once, respect the limits and shrink when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptj8.model.scoring.batching import for_each_batch, max_batch_tokens, pad_right, plan_batches


@pytest.mark.parametrize("max_rows", [1, 3, 100])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_every_row_is_in_one_batch_within_the_limits(max_rows, max_tokens):
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    batches = plan_batches(lengths, max_rows, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
    first = [lengths[batch[0]] for batch in batches]
    assert first == sorted(first, reverse=True)


def test_no_rows():
    assert plan_batches([], 4, 100) == []
    for_each_batch([], lambda batch: None, "nothing", 0)


def test_padding_is_on_the_right():
    ids, lengths = pad_right([[5], [1, 2, 3], [4, 5]], torch.device("cpu"))
    assert ids.tolist() == [[5, 0, 0], [1, 2, 3], [4, 5, 0]]
    assert lengths.tolist() == [1, 3, 2]


def test_batch_is_halved_when_out_of_memory():
    done = []

    def score(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("simulated")
        done.append(batch)

    for_each_batch([list(range(10)), [10, 11, 12, 13], [14]], score, "test", 15)
    assert [index for batch in done for index in batch] == list(range(15))
    assert max(map(len, done)) == 2


def test_single_row_out_of_memory_raises():
    def score(batch):
        raise torch.OutOfMemoryError("simulated")

    with pytest.raises(torch.OutOfMemoryError):
        for_each_batch([[0, 1]], score, "test", 2)


def test_progress_is_written_to_stderr(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)  # a log file gets a line every 30 s
    monkeypatch.setattr("gptj8.runtime.progress._REFRESH_SECONDS", 0)
    for_each_batch([[0, 1], [2]], lambda batch: None, "tuned: perplexity", 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tuned: perplexity" in captured.err
    assert "3 of 3 rows" in captured.err


def test_no_description_disables_the_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    done = []
    for_each_batch([[0, 1], [2]], done.append, None, 3)
    assert done == [[0, 1], [2]]
    assert capsys.readouterr().err == ""


def test_number_of_logits_limits_the_batch():
    assert max_batch_tokens(torch.device("cpu"), 4_096) == 2048
    assert max_batch_tokens(torch.device("cpu"), 50_400) == 1331
    assert max_batch_tokens(torch.device("cuda"), 50_400) == 1331
    assert max_batch_tokens(torch.device("cuda"), 1 << 40) == 1
