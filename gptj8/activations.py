"""Activation functions in one operation each.

transformers writes GPT-J's GELU as eight operations on the widest tensor of a block, each of which
reads and writes it whole, and keeps five of their results for backward. torch has the same function
(Hendrycks and Gimpel's tanh form, arXiv:1606.08415) in one, which keeps its input alone; in 16 bits
it rounds once.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

_TANH_GELUS = (NewGELUActivation, FastGELUActivation)


def fuse_activations(model: nn.Module) -> None:
    """Replace what torch has in one piece, in place."""
    for name, module in list(model.named_modules()):
        if type(module) in _TANH_GELUS:
            model.set_submodule(name, nn.GELU(approximate="tanh").train(module.training))
