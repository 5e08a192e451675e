"""torchao with int8 weights, compiled: eager torchao restores each matrix at each call.

Weights are frozen into the compiled code (`freezing`), so that Inductor can replace the product by
one that reads int8, and kernels are chosen by timing them (`max_autotune`), as torch's notes on
CPUs advise.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor import cpu_vec_isa
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from benchmarks.opponents import plain
from benchmarks.opponents.torch_models import TorchModel


def _forget_amx() -> None:
    """Let Inductor use AVX-512 without AMX: by "avx512", it means whatever has that and more."""
    valid = [i for i in cpu_vec_isa.valid_vec_isa_list() if not isinstance(i, cpu_vec_isa.VecAMX)]
    cpu_vec_isa.valid_vec_isa_list = lambda: valid


class TorchAO(TorchModel):
    """transformers' model with torchao's weights and a compiled forward pass, without adapter."""

    decode_cache = "static"

    def load_base(self) -> Any:
        inductor.freezing = True
        inductor.max_autotune = True
        if os.environ.get("ATEN_CPU_CAPABILITY") == "avx512":
            _forget_amx()
        model = plain.load(self.options).requires_grad_(False)
        quantize_(model, Int8WeightOnlyConfig())
        model.to(self.device)
        model.forward = torch.compile(model.forward, dynamic=False)
        return model

    def adapted(self) -> Any:
        return self.model


create: type[TorchAO] = TorchAO
