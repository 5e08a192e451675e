"""Activation checkpointing: recompute activations in backward instead of keeping them.

    kind        kept per block                         recomputed in backward
    none        everything                             nothing
    selective   outputs of 8-bit matrix products       norms, activations, adapters (memory-bound,
                and of fused attention                 little arithmetic)
    reuse       the block's input                      same as full; a dequantized matrix is also
                                                       used for the gradient
    full        the block's input                      all but the last matrix product, if that has
                                                       no adapter

Frozen matrices need no weight gradients, so a step is two units of arithmetic instead of three, and
recomputing the forward pass adds a third unit: checkpointing adds half of a step's arithmetic, not
a third. The results are byte-identical.

Selective checkpointing uses torch's `create_selective_checkpoint_contexts`, after Korthikanti et
al., Reducing Activation Recomputation in Large Transformer Models, arXiv:2205.05198. The operators
are chosen for models whose matrix products are cheap to keep and expensive to recompute.
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
"""Kinds per device type, from the fastest to the one that needs the least memory. The CPU has no
`reuse`: allocating memory for the matrices costs more than dequantizing them twice, so `reuse` has
0.8 to 0.96 times the speed of `full`."""

_ATTENTION = "aten::_scaled_dot_product"


def set_checkpointing(model: PeftModel, kind: Kind) -> None:
    """Set the kind of activation checkpointing that a model uses in training."""
    operators.drop_kept()
    base: Any = model.get_base_model()
    if kind == "none":
        base.activation_checkpointing_disable()
        return
    # Reentrant checkpointing computes no gradients if the embeddings are frozen.
    arguments: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    elif kind == "reuse":
        arguments["context_fn"] = _reusing
    base.activation_checkpointing_enable(arguments)
    # The call above makes the embeddings' output require a gradient, for reentrant checkpointing.
    # That gradient is unused, and computing it would repeat the first block's matrix products.
    base.disable_input_require_grads()


def _reusing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's forward pass and of its recomputation."""
    return nullcontext(), operators.KeepingMatrices()


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_product = operator is torch.ops.gptj8.frozen_linear.default
    if is_product or operator.name().startswith(_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
