"""bitsandbytes: its own layers, and the original 8-bit GPT-J method made of its operators."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.opponents import plain
from benchmarks.opponents.server import Options
from benchmarks.opponents.torch_models import TorchModel

_BLOCK_SIZE = 4096


class _JustInTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, absmax, code):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, absmax, code)
        return nn.functional.linear(x, _restore(codes, absmax, code, x.dtype))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad @ _restore(*ctx.saved_tensors, grad.dtype), None, None, None


def _restore(
    codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, _BLOCK_SIZE, dtype)


class JustInTimeLinear(nn.Linear):
    """The layer of the original method: bitsandbytes codes, restored in forward and backward."""

    def __init__(self, original: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        code = create_dynamic_map().float().to(original.weight.device)
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(
            original.weight, code, _BLOCK_SIZE
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", absmax.float())
        self.register_buffer("code", code)
        self.bias = original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _JustInTime.apply(x, self.weight, self.absmax, self.code)
        return y if self.bias is None else y + self.bias


class JustInTime(TorchModel):
    """Linear layers in the original method's format; converted on the device, one by one."""

    def load_base(self) -> Any:
        model = plain.load(self.options)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, JustInTimeLinear(module.to(self.device)))
        return model.to(self.device)


class OwnLayers(TorchModel):
    """The layers of bitsandbytes, as transformers loads them."""

    def load_base(self) -> Any:
        if self.options.name == "llm-int8":
            settings = BitsAndBytesConfig(load_in_8bit=True)
        else:
            settings = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype
            )
        return AutoModelForCausalLM.from_pretrained(
            self.options.original,
            dtype=self.dtype,
            quantization_config=settings,
            device_map={"": self.device},
        )


def create(options: Options) -> TorchModel:
    """Return the method that has this name."""
    return (JustInTime if options.name == "jit-bitsandbytes" else OwnLayers)(options)
