"""Operations of a block in one piece each: GPT-J's attention, and GELU.

transformers has no fused attention for GPT-J. Its own attention writes the scores of all pairs of
tokens in float32, several times over: 268 MB a copy at 2,048 tokens.
`torch.nn.functional.scaled_dot_product_attention` keeps a tile of them and sums in float32 as well.
Registered under the name that transformers looks for, "sdpa", it becomes GPT-J's default, and
`attn_implementation="eager"` still gives the original.

transformers writes GPT-J's GELU as eight operations on the widest tensor of a block, each of which
reads and writes it whole, and keeps five of their results for backward. torch has the same function
(Hendrycks and Gimpel's tanh form, arXiv:1606.08415) in one, which keeps its input alone; in 16 bits
it rounds once.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.gptj import modeling_gptj

_TANH_GELUS = (NewGELUActivation, FastGELUActivation)


class GPTJFusedAttention(modeling_gptj.GPTJAttention):
    """GPT-J's attention with its scores computed in tiles; everything else is inherited."""

    def _attn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return (batch, heads, queries, head_dim) and, in place of scores, None."""
        # transformers leaves the mask out where it would be causal and nothing else. A single query
        # sees all keys: torch would let it see the first one only.
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
    """Make fused attention the default of every GPT-J that transformers builds from now on."""
    modeling_gptj.GPTJ_ATTENTION_CLASSES["sdpa"] = GPTJFusedAttention
    modeling_gptj.GPTJPreTrainedModel._supports_sdpa = True


def fuse_activations(model: nn.Module) -> None:
    """Replace what torch has in one piece, in place."""
    for name, module in list(model.named_modules()):
        if type(module) in _TANH_GELUS:
            model.set_submodule(name, nn.GELU(approximate="tanh").train(module.training))
