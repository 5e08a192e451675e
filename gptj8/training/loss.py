"""The loss of a batch; with a frozen 8-bit head, computed in chunks of a few hundred tokens.

With a vocabulary of 50,000, float32 logits take 200 KB per token, and softmax and its gradient take
as much again: they are the largest tensors of a step. The head is frozen, so backward needs only
the gradient of the loss with respect to the head's input. It is computed in forward, chunk by
chunk, and the logits are dropped (as Liger and cut cross-entropy do for trained heads,
arXiv:2411.09009).

    loss = sum_t  log sum_v exp(l_tv) - l_t,target        l = h W^T + b
    dh_t = (softmax(l_t) - onehot(target)) W
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gptj8.dataset.prepared.examples import IGNORED
from gptj8.quantization.layers import Frozen8bitLinear, in_autocast_dtype

_PLAIN_HEADS = frozenset(
    ("bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt", "qwen2")
)
_CHUNK_BYTES = 1 << 27
# Float32 logits per slice; on a CPU, as many as its caches hold.
_SLICE_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 24}
# Most probabilities are below 6e-8, float16's smallest number. Scaling by a power of two is exact.
_FLOAT16_SCALE = 1024.0


def summed_loss(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the loss summed over learned tokens, their number, and the model's outputs.

    Args:
        model: A transformers or PEFT model.
        inputs: From `batches.Collator` or `packing.PackedCollator`.
    """
    is_packed = "position_ids" in inputs
    targets = inputs["labels"][:, 1:]  # the logits at a position predict the next token
    learned = (targets != IGNORED).any(dim=0).nonzero().flatten()
    targets = targets[:, learned]
    arguments = {
        "input_ids": inputs["input_ids"],
        # Of a packed batch, the model derives the mask from the positions.
        **{name: inputs[name] for name in ["position_ids" if is_packed else "attention_mask"]},
        "logits_to_keep": learned,
    }
    head = frozen_head(model)
    if head is None:
        outputs = model(**arguments)
        total = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    else:
        with input_of(head) as taken:
            outputs = model(**arguments)
        is_learned = targets != IGNORED
        total = frozen_cross_entropy(taken[0][is_learned], targets[is_learned], head)
    return total, (targets != IGNORED).sum(), outputs


def frozen_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Frozen8bitLinear
) -> torch.Tensor:
    """Return the sum of -log softmax(head(hidden))[target] over all tokens: float32, in nats.

    Args:
        hidden: (tokens, in) in the compute dtype; under autocast it is cast to autocast's dtype.
        targets: (tokens,) int64.
        head: Head whose weight and bias get no gradient.
    """
    return _FrozenCrossEntropy.apply(in_autocast_dtype(hidden), targets, head)


def frozen_head(model: Any) -> Frozen8bitLinear | None:
    """Return the model's head if it is a frozen 8-bit layer that outputs the logits, else None.

    Models that scale or cap their logits give None.

    Args:
        model: A transformers or PEFT model, possibly wrapped for data-parallel training.
    """
    model = getattr(model, "module", model)
    head = model.get_output_embeddings()
    is_plain = type(head) is Frozen8bitLinear and not (
        head.bias is not None and head.bias.requires_grad
    )
    return head if is_plain and model.config.model_type in _PLAIN_HEADS else None


@contextmanager
def input_of(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that collects the head's inputs, and replace its logits by one value per token.

    The model itself is called normally, which its wrappers rely on.
    """
    taken: list[torch.Tensor] = []

    def take(hidden: torch.Tensor) -> torch.Tensor:
        taken.append(hidden)
        return hidden[..., :1]

    head.forward = take  # type: ignore[method-assign]  # shadows the class's method
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
        # Chunks of equal size: a matrix product with few remaining tokens would be slow.
        at_most = max(1, _CHUNK_BYTES // (hidden.element_size() * head.out_features))
        chunks = -(-len(hidden) // at_most)
        for number in range(chunks):
            chunk = slice(len(hidden) * number // chunks, len(hidden) * (number + 1) // chunks)
            logits = torch.ops.gptj8.frozen_linear(
                hidden[chunk], *quantized, head.bias, head.block_size, False, head.levels
            )
            total += _replace_by_gradient(logits, targets[chunk, None], scale, needs_grad)
            if gradient is not None:
                product = torch.ops.gptj8.frozen_linear_backward(
                    logits, *quantized, head.block_size, False, head.levels
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
    """Return the summed loss of logits (tokens, vocabulary), given targets (tokens, 1).

    If a gradient is needed, the logits are overwritten with `scale` times the loss's gradient.
    """
    total = torch.zeros((), device=logits.device)
    rows = max(1, _SLICE_LOGITS.get(logits.device.type, 1 << 24) // logits.shape[1])
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        values = part.float()
        normalizer = values.logsumexp(1, keepdim=True)
        total += (normalizer - values.gather(1, target)).sum()
        if needs_grad:
            # Not in place: `values` is `part` itself if the logits are already float32.
            difference = (values - normalizer).exp_()
            difference.scatter_add_(1, target, difference.new_full(target.shape, -1.0))
            part.copy_(difference.mul_(scale) if scale != 1 else difference)
    return total
