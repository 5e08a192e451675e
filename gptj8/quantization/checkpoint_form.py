"""The form in which a converted model is stored in its files, and the checks of that form."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps

from gptj8.quantization.layers import Frozen8bitModule
from gptj8.quantization.shards import FLOATS
from gptj8.runtime.errors import QuantizationError


def names_of_rows(model: nn.Module) -> set[str]:
    """Return the names of the weights whose codes are stored as one row of numbers.

    The shape of the weight would let transformers without gptj8 load codes as if they were weights,
    with a warning only. A row does not fit, so that it raises an error. Tied weights keep their
    shape, because transformers reads them from the files as they are if layers stay on the disk,
    and a single row is enough for the error. Without any other weight, they are rows too.
    """
    names = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Frozen8bitModule)}
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return names - {*pairs, *pairs.values()} or names


class Unflatten(ConversionOps):
    """Gives codes the shape of the module's weight, which they have in older directories."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        ((value,),) = input_dict.values()
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if isinstance(module, Frozen8bitModule) and value.shape == (module.weight.numel(),):
            value = value.view(module.weight.shape)
        return {full_layer_name: value}


def unflattens(conversion: Any) -> bool:
    """Return whether an entry of transformers' loading operations is `Unflatten`."""
    return any(isinstance(op, Unflatten) for op in getattr(conversion, "operations", ()))


def check_dtypes(model: nn.Module, files: list[str], in_8_bits: bool) -> None:
    """Raise an error if codes would be cast to floats, or anything but floats quantized.

    The results would be meaningless.

    Args:
        model: with frozen modules.
        files: the checkpoint; only safetensors are checked.
        in_8_bits: whether the frozen modules' weights are stored as codes.
    """
    modules = dict(model.named_modules())
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                module = modules.get(name.removesuffix(".weight"))
                if module is None or not name.endswith(".weight"):
                    continue
                stored = tensors.get_slice(name).get_dtype()
                is_code = in_8_bits and isinstance(module, Frozen8bitModule)
                if (stored == "U8") if is_code else (stored in FLOATS):
                    continue
                wanted = torch.uint8 if is_code else "floating-point weights"
                if in_8_bits:
                    raise QuantizationError(
                        f"{name} is {stored} in the checkpoint, but the quantization_config "
                        f"requires {wanted}; skip_modules or the file was changed after the "
                        "conversion"
                    )
                raise QuantizationError(f"{name} is {stored} in the checkpoint, not {wanted}")


def require_loaded(name: str, module: Frozen8bitModule) -> None:
    """Raise an error if a tensor of a module was missing in the checkpoint.

    The module would otherwise compute with uninitialized memory.
    """
    for part in ("weight", *module.buffer_names):
        # transformers sets this attribute on loaded tensors so that they are not initialized.
        if not getattr(getattr(module, part), "_is_hf_initialized", False):
            raise QuantizationError(f"the checkpoint has no tensor {name}.{part}")
