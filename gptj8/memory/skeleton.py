"""Build a model from its config.json without weights, and count the exact bytes of its tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.quantization.layers import QUANTIZED_BUFFERS, Frozen8bitModule
from gptj8.quantization.quantizer import (
    QUANT_METHOD,
    Blockwise8bitConfig,
    swap_modules,
    tied_modules,
)
from gptj8.runtime.errors import QuantizationError, UserError
from gptj8.runtime.files import read_json
from gptj8.runtime.messages import one_line

if TYPE_CHECKING:
    from peft import PeftModel

_DEPTHS = ("n_layer", "num_layers", "num_hidden_layers")
# bitsandbytes: two 8-bit moments with a float32 scale per 256 weights; 32-bit moments for tensors
# with fewer than 4,096 weights.
_SMALL = 4096
_OPTIMIZER_BLOCK = 256


@dataclass(frozen=True)
class Weights:
    """Sizes in bytes of a model with its adapter.

    Attributes:
        codes: 8-bit weights.
        scales: Their absmax and codebooks.
        unquantized: All other parameters and buffers of the base model.
        adapter: Trained weights, float32.
        trained: Number of trained weights.
        optimizer: Optimizer state.
    """

    codes: int
    scales: int
    unquantized: int
    adapter: int
    trained: int
    optimizer: int

    @property
    def base(self) -> int:
        """Bytes of the frozen base model."""
        return self.codes + self.scales + self.unquantized


def read_config(path: str | Path) -> Any:
    """Return transformers' config of a model.

    Args:
        path: A config.json, or a directory that contains one. Weights are not read.

    Raises:
        UserError: If there is no config.json, or its architecture is not supported.
    """
    path = Path(path)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json; pass a model directory or a config.json")
    content = read_json(file)
    architecture = content.get("model_type") if isinstance(content, dict) else None
    if not architecture or not isinstance(architecture, str):
        raise UserError(f"{file} has no model_type; check that it is the config.json of a model")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{file}: model_type = {architecture} is not a causal language model in transformers; "
            "models with custom code are not supported"
        )
    quantization = content.get("quantization_config")
    if quantization and quantization.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"{file}: the model is quantized ({quantization.get('quant_method')}); use the "
            "config.json of the original model"
        )
    try:
        return AutoConfig.for_model(
            architecture, **{k: v for k, v in content.items() if k != "model_type"}
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: {one_line(error)}") from None


def layers_of(config: Any) -> int:
    """Return the number of blocks of a model."""
    return int(config.num_hidden_layers)


def with_layers(config: Any, layers: int) -> Any:
    """Return the config of the same model with only its first `layers` blocks."""
    shorter = copy.deepcopy(config)
    name = next(n for n in _DEPTHS if n in shorter.to_dict())
    for depth_list in ("attention_layers", "layer_types"):
        if isinstance(getattr(shorter, depth_list, None), list):
            setattr(shorter, depth_list, getattr(shorter, depth_list)[:layers])
    setattr(shorter, name, layers)
    return shorter


@torch.random.fork_rng(devices=[])  # building a model draws initial values, even on meta
def build(
    config: Any, quantization: Blockwise8bitConfig, dtype: torch.dtype, adapter: AdapterSpec
) -> PeftModel:
    """Return the model with 8-bit modules and adapter on the meta device.

    Args:
        config: From `read_config`. If it has a quantization config, that replaces `quantization`.
        quantization: How the model would be converted.
        dtype: Dtype of computation and of unquantized tensors.
        adapter: The adapter to add.

    Raises:
        UserError: If no model can be built from the config, or the adapter does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    from gptj8.kernels.fused import register_fused_attention

    register_fused_attention()
    config = copy.deepcopy(config)
    own = getattr(config, "quantization_config", None)
    if own is not None:
        own = own if isinstance(own, dict) else own.to_dict()
        quantization = Blockwise8bitConfig.from_dict(own)
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = one_line(error)
        raise UserError(f"cannot build a model from config.json: {reason}") from None
    try:
        swap_modules(model, quantization, dtype)
    except QuantizationError as error:
        raise UserError(f"config.json: {error}") from None
    for tied, origin in tied_modules(model):
        tied.weight = origin.weight
        tied.use_scales_of(origin)
    return add_adapter(model, adapter)


def weigh(model: nn.Module, optim: str = "adamw_bnb_8bit") -> Weights:
    """Count the bytes of a model.

    Args:
        model: A model on the meta device, or a loaded one.
        optim: `adamw_bnb_8bit` or `adamw_torch`.
    """
    sizes = {"codes": 0, "scales": 0, "unquantized": 0, "adapter": 0, "trained": 0, "optimizer": 0}
    for kind, tensor in _tensors(model):
        size = tensor.numel() * tensor.element_size()
        sizes[kind] += size
        if kind == "adapter":
            sizes["trained"] += tensor.numel()
            sizes["optimizer"] += optimizer_bytes(tensor.numel(), optim)
    return Weights(**sizes)


def optimizer_bytes(weights: int, optim: str) -> int:
    """Return the bytes of an optimizer's two moments for a tensor with `weights` weights."""
    if optim != "adamw_bnb_8bit" or weights < _SMALL:
        return 8 * weights
    return 2 * (weights + 4 * math.ceil(weights / _OPTIMIZER_BLOCK))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor once with its kind, even if several modules share it."""
    seen: set[int] = set()
    for module in model.modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in tensors:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.requires_grad:
                kind = "adapter"
            elif isinstance(module, Frozen8bitModule) and name == "weight":
                kind = "codes"
            elif isinstance(module, Frozen8bitModule) and name in QUANTIZED_BUFFERS:
                kind = "scales"
            else:
                kind = "unquantized"
            yield kind, tensor
