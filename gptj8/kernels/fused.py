"""Fused attention and GELU for GPT-J.

transformers has no fused attention for GPT-J. Its eager attention stores the scores of all token
pairs in float32 several times; one copy takes 268 MB at 2,048 tokens.
`torch.nn.functional.scaled_dot_product_attention` holds only a tile of the scores and also sums in
float32. It is registered as "sdpa", which makes it the default for GPT-J;
`attn_implementation="eager"` still selects the original.

transformers computes GPT-J's GELU with eight operations on the widest tensor of a block. Each of
them reads and writes the complete tensor, and five results are saved for backward. torch has the
same function (the tanh approximation of Hendrycks and Gimpel, arXiv:1606.08415) as one operation,
which saves only its input and, in 16 bits, rounds once.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.gptj import modeling_gptj

_TANH_GELUS = (NewGELUActivation, FastGELUActivation)


class GPTJFusedAttention(modeling_gptj.GPTJAttention):
    """GPT-J's attention with scores computed in tiles; everything else is inherited."""

    def _attn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return the output (batch, heads, queries, head_dim), and None instead of the scores."""
        # transformers passes no mask if attention is only causal. A single query must see all keys,
        # but with is_causal torch would let it see only the first one.
        is_causal = attention_mask is None and query.shape[2] > 1
        output = functional.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=is_causal,
            scale=1.0 / self.scale_attn,
        )
        return output, None


def register_fused_attention() -> None:
    """Make fused attention the default for every GPT-J model that transformers builds."""
    modeling_gptj.GPTJ_ATTENTION_CLASSES["sdpa"] = GPTJFusedAttention
    modeling_gptj.GPTJPreTrainedModel._supports_sdpa = True


def fuse_activations(model: nn.Module) -> None:
    """Replace tanh GELU modules by torch's fused operation, in place."""
    for name, module in list(model.named_modules()):
        if type(module) in _TANH_GELUS:
            model.set_submodule(name, nn.GELU(approximate="tanh").train(module.training))
