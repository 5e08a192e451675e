"""Small random models of each architecture, and a tokenizer trained on the spot."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptj8.prompts import TextEncoder

VOCABULARY = 131
CONTEXT = 64

ARCHITECTURES = {
    "gptj": {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "gpt2": {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {
        "max_position_embeddings": CONTEXT,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "llama": {
        "max_position_embeddings": CONTEXT,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def _make_model(architecture: str, attention: str = "eager") -> torch.nn.Module:
    """A float32 model in eval mode whose weights are large enough for tokens to differ widely."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
        **ARCHITECTURES[architecture],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other make tiny products 80 times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """A byte-level encoder of `VOCABULARY` tokens at most, without a BOS; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    text = "the quick brown fox jumps over the lazy dog\n\nLabel: sql sqlalchemy pandas = + - @"
    tokenizer.train_from_iterator([text] * 3, trainer)
    return TextEncoder(tokenizer, eos_id=0)
