"""Activation checkpointing: what a step computes again in backward instead of keeping it.

    kind        a block keeps                          and computes again
    none        everything                             nothing
    selective   what its products with 8-bit weights   norms, activations, adapters: what reads
                and its fused attention return         memory and computes little
    reuse       its input                              as full; a matrix that is restored for it
                                                       serves the gradient too
    full        its input                              all but its last product, if that has no
                                                       adapter

The frozen matrices have no gradient of their own, so that a step is two units of arithmetic and
recomputing all of it makes three: checkpointing costs half as much again, not a third. The results
are the same bytes.

Selective checkpointing is torch's (`create_selective_checkpoint_contexts`), after Korthikanti et
al., Reducing Activation Recomputation in Large Transformer Models, arXiv:2205.05198; the choice of
operators is for models whose products are cheap to keep and expensive to repeat.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from gptj8.kernels import operators

if TYPE_CHECKING:
    from peft import PeftModel

Kind = Literal["full", "reuse", "selective", "none"]
KINDS: dict[str, tuple[Kind, ...]] = {
    "cpu": ("none", "selective", "full"),
    "cuda": ("none", "selective", "reuse", "full"),
}
"""Of a kind of device, from the fastest to the one that takes the least memory. On a CPU new memory
for matrices costs more than restoring them once more: `reuse` has 0.8 to 0.96 of full's speed."""

_ATTENTION = "aten::_scaled_dot_product"


def set_checkpointing(model: PeftModel, kind: Kind) -> None:
    """Make a model checkpoint its blocks in training, or not at all."""
    operators.drop_kept()
    base: Any = model.get_base_model()
    if kind == "none":
        base.activation_checkpointing_disable()
        return
    # The reentrant kind gives no gradient where the embeddings are frozen.
    arguments: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    elif kind == "reuse":
        arguments["context_fn"] = _reusing
    base.activation_checkpointing_enable(arguments)
    # That makes the embeddings' output require a gradient, for the reentrant kind. It is nobody's,
    # and computing it takes the first block's products once more.
    base.disable_input_require_grads()


def _reusing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's first computation and of its second."""
    return nullcontext(), operators.KeepingMatrices()


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = operator is torch.ops.gptj8.frozen_linear.default
    if is_product or operator.name().startswith(_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
