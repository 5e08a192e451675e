"""The sizes of the models that are compared. Imports nothing, so any environment can use it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a model with random weights.

    Attributes:
        architecture: "gptj" or "llama".
        width: length of a hidden state.
        inner: length of the hidden state inside the MLP.
        heads, key_heads: number of attention heads, for queries and for keys and values.
        rotary: number of values per head that are rotated.
        is_tied: whether the head shares the embedding's weights.
    """

    architecture: str
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    rotary: int
    vocabulary: int
    positions: int = 2048
    is_tied: bool = False

    def config(self) -> dict[str, Any]:
        """Return the model's configuration as transformers names it."""
        common = {
            "model_type": self.architecture,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.is_tied,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if self.architecture == "gptj":
            return common | {
                "n_embd": self.width,
                "n_inner": self.inner,
                "n_layer": self.layers,
                "n_head": self.heads,
                "rotary_dim": self.rotary,
                "n_positions": self.positions,
            }
        return common | {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": self.positions,
        }

    def as_llama(self) -> Shape:
        """Return a Llama with as many weights: its MLP has three matrices instead of two."""
        if self.architecture == "llama":
            return self
        inner = self.inner * 2 // 3 // 32 * 32  # quantized in blocks of 32
        return replace(self, architecture="llama", inner=inner, rotary=self.width // self.heads)

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes, from which `Shape(**...)` makes an equal one."""
        return asdict(self)


SIZES = {
    "full": {
        "main": Shape("gptj", 4096, 16384, 2, 16, 16, 64, 50400),
        "small": Shape("llama", 576, 1536, 30, 9, 3, 64, 49152, is_tied=True),
    },
    "tiny": {
        "main": Shape("gptj", 64, 256, 2, 4, 4, 8, 512),
        "small": Shape("llama", 64, 128, 2, 4, 2, 16, 512, is_tied=True),
    },
}
"""The models of each size: `main` is GPT-J-6B with two layers, `small` is SmolLM2-135M."""


def word(token: int) -> str:
    """Return the word of a token id above 0 in the tokenizer of these models."""
    return f"word{token}"
