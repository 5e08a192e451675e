"""torch's own product with int8 weights, `_weight_int8pack_mm`, in all linear layers.

It is what torch ships for int8 weights on a CPU without any package: one scale per row, no packing,
activations in the dtype of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.opponents import plain
from benchmarks.opponents.torch_models import TorchModel


class Int8Linear(nn.Module):
    """A linear layer with int8 weights (out, in) and a scale per output."""

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        weight = original.weight.detach()
        scales = weight.abs().amax(1).float().clamp(min=1e-12) / 127
        self.register_buffer("codes", (weight.float() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales.to(weight.dtype))
        self.bias = original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b for x (..., in)."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch._weight_int8pack_mm(flat, self.codes, self.scales)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Pack(TorchModel):
    """transformers' model with these layers, without an adapter."""

    def load_base(self) -> Any:
        model = plain.load(self.options)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, Int8Linear(module))
        return model.to(self.device)

    def adapted(self) -> Any:
        return self.model


create: type[Int8Pack] = Int8Pack
