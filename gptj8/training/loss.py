"""Cross-entropy of a frozen 8-bit head, a few hundred tokens at a time.

A vocabulary of 50,000 makes 200 KB of float32 logits a token, and softmax and its gradient as much
again: they are the largest tensors of a step. The head is frozen, so the gradient of the loss with
respect to its input is all that backward needs of them; it is computed in forward, chunk by chunk,
and the logits are dropped (as Liger and cut cross-entropy do for trained heads, arXiv:2411.09009).

    loss = sum_t  log sum_v exp(l_tv) - l_t,target        l = h W^T + b
    dh_t = (softmax(l_t) - onehot(target)) W
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gptj8.quantization.layers import Frozen8bitLinear, in_autocast_dtype

_PLAIN_HEADS = frozenset(
    ("bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt", "qwen2")
)
_CHUNK_BYTES = 1 << 27
# Logits in float32 at a time: on a CPU what its caches hold.
_SLICE_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 24}
# float16 has no numbers below 6e-8, where most probabilities are; powers of two cost no precision.
_FLOAT16_SCALE = 1024.0


def frozen_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Frozen8bitLinear
) -> torch.Tensor:
    """Return the sum of -log softmax(head(hidden))[target] over all tokens: float32, in nats.

    Args:
        hidden: (tokens, in), the arithmetic's dtype, or autocast's takes its place.
        targets: (tokens,) int64.
        head: whose weight and bias get no gradient.
    """
    return _FrozenCrossEntropy.apply(in_autocast_dtype(hidden), targets, head)


def frozen_head(model: Any) -> Frozen8bitLinear | None:
    """Return the head whose output is the model's logits as they are; None where it is trained, in
    full precision, or followed by something else, as in models that scale or cap their logits.

    Args:
        model: of transformers, PEFT, or wrapped for data-parallel training.
    """
    model = getattr(model, "module", model)
    head = model.get_output_embeddings()
    is_plain = type(head) is Frozen8bitLinear and not (
        head.bias is not None and head.bias.requires_grad
    )
    return head if is_plain and model.config.model_type in _PLAIN_HEADS else None


@contextmanager
def input_of(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that takes what the head is given; it hands on one number a token in place of
    its logits. The model is called as always, which what wraps it relies on."""
    taken: list[torch.Tensor] = []

    def take(hidden: torch.Tensor) -> torch.Tensor:
        taken.append(hidden)
        return hidden[..., :1]

    head.forward = take  # type: ignore[method-assign]  # the instance's own, found first
    try:
        yield taken
    finally:
        del head.forward


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Frozen8bitLinear):  # type: ignore[no-untyped-def]
        needs_grad = ctx.needs_input_grad[0]
        quantized = (head.weight.detach(), head.absmax, head.codebook)
        scale = _FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_grad else None
        # Of one size: a product with the few tokens that would be left over is a slow one.
        at_most = max(1, _CHUNK_BYTES // (hidden.element_size() * head.out_features))
        chunks = -(-len(hidden) // at_most)
        for number in range(chunks):
            chunk = slice(len(hidden) * number // chunks, len(hidden) * (number + 1) // chunks)
            logits = torch.ops.gptj8.frozen_linear(
                hidden[chunk], *quantized, head.bias, head.block_size, False
            )
            total += _replace_by_gradient(logits, targets[chunk, None], scale, needs_grad)
            if gradient is not None:
                product = torch.ops.gptj8.frozen_linear_backward(
                    logits, *quantized, head.block_size, False
                )
                gradient[chunk] = product.div_(scale) if scale != 1 else product
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None


def _replace_by_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, needs_grad: bool
) -> torch.Tensor:
    """Return the summed loss of logits (tokens, vocabulary), given targets (tokens, 1); where a
    gradient is needed, `scale` times the loss's takes their place."""
    total = torch.zeros((), device=logits.device)
    rows = max(1, _SLICE_LOGITS.get(logits.device.type, 1 << 24) // logits.shape[1])
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        values = part.float()
        normalizer = values.logsumexp(1, keepdim=True)
        total += (normalizer - values.gather(1, target)).sum()
        if needs_grad:
            # A copy even where the logits are float32 already and `values` is `part` itself.
            difference = (values - normalizer).exp_()
            difference.scatter_add_(1, target, difference.new_full(target.shape, -1.0))
            part.copy_(difference.mul_(scale) if scale != 1 else difference)
    return total
