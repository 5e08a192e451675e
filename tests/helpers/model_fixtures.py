"""Fixtures: small random models and a newly trained tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptj8.dataset.prepared.text_encoder import TextEncoder
from tests.helpers.small_models import VOCABULARY
from tests.helpers.small_models import make_model as _make_model


@pytest.fixture(scope="session")
def make_model():
    return _make_model


@pytest.fixture(scope="session")
def model(make_model):
    return make_model("gptj")


@pytest.fixture(
    scope="session",
    params=[("gptj", "eager"), ("gpt2", "sdpa"), ("gpt_neox", "eager"), ("llama", "sdpa")],
    ids=lambda param: "-".join(param),
)
def any_model(request, make_model):
    return make_model(*request.param)


@pytest.fixture(scope="session")
def encoder():
    """Return a byte-level encoder with at most `VOCABULARY` tokens, no BOS and the EOS id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    text = "the quick brown fox jumps over the lazy dog\n\nLabel: sql sqlalchemy pandas = + - @"
    tokenizer.train_from_iterator([text] * 3, trainer)
    return TextEncoder(tokenizer, eos_id=0)
