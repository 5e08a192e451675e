"""A model as its config.json describes it, without a weight: what there will be, byte for byte."""

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
from gptj8.quantization.layers import Frozen8bitModule
from gptj8.quantization.quantizer import QUANT_METHOD, Blockwise8bitConfig, swap_modules
from gptj8.runtime.errors import QuantizationError, UserError
from gptj8.runtime.files import read_json

if TYPE_CHECKING:
    from peft import PeftModel

_DEPTHS = ("n_layer", "num_layers", "num_hidden_layers")
# bitsandbytes: two moments of one byte with a float32 scale for each 256; 32 bits below 4,096.
_SMALL = 4096
_OPTIMIZER_BLOCK = 256


@dataclass(frozen=True)
class Weights:
    """What a model with its adapter holds throughout, in bytes.

    Attributes:
        codes: 8-bit weights.
        scales: their absmax and codebooks.
        unquantized: all other parameters and buffers of the base.
        adapter: trained weights, float32.
        trained: how many those are.
        optimizer: state of the optimizer.
        mapped: of all these what stays in the weights' file until it is read.
    """

    codes: int
    scales: int
    unquantized: int
    adapter: int
    trained: int
    optimizer: int

    @property
    def base(self) -> int:
        """Bytes of the frozen model."""
        return self.codes + self.scales + self.unquantized


def read_config(path: str | Path) -> Any:
    """Return transformers' config of a model.

    Args:
        path: a config.json, or a directory that holds one; its weights are not looked at.

    Raises:
        UserError: if there is none, or no architecture that is known.
    """
    path = Path(path)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json; give a model directory or a config.json")
    content = read_json(file)
    architecture = content.get("model_type") if isinstance(content, dict) else None
    if not architecture or not isinstance(architecture, str):
        raise UserError(f"{file} names no model_type; is it a model's config?")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{file}: model_type = {architecture} is no causal language model that transformers "
            "knows without code of its own"
        )
    quantization = content.get("quantization_config")
    if quantization and quantization.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"{file}: the model is quantized ({quantization.get('quant_method')}); give the "
            "original's config.json"
        )
    try:
        return AutoConfig.for_model(
            architecture, **{k: v for k, v in content.items() if k != "model_type"}
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())[:300]}") from None


def layers_of(config: Any) -> int:
    """Return how many blocks a model has."""
    return int(config.num_hidden_layers)


def with_layers(config: Any, layers: int) -> Any:
    """Return the config of the same model with its first blocks only."""
    shorter = copy.deepcopy(config)
    name = next(n for n in _DEPTHS if n in shorter.to_dict())
    for depth_list in ("attention_layers", "layer_types"):
        if isinstance(getattr(shorter, depth_list, None), list):
            setattr(shorter, depth_list, getattr(shorter, depth_list)[:layers])
    setattr(shorter, name, layers)
    return shorter


@torch.random.fork_rng(devices=[])  # initial values that nobody sees are drawn all the same
def build(
    config: Any, quantization: Blockwise8bitConfig, dtype: torch.dtype, adapter: AdapterSpec
) -> PeftModel:
    """Return the model with 8-bit modules and adapter on the meta device.

    Args:
        config: from `read_config`; what it says of its own quantization is used instead.
        quantization: how it would be converted.
        dtype: of the arithmetic, and of what stays unquantized.

    Raises:
        UserError: if the config describes no model, or the adapter does not go with it.
    """
    from transformers import AutoModelForCausalLM

    from gptj8.kernels.fused import register_fused_attention

    register_fused_attention()
    config = copy.deepcopy(config)
    own = getattr(config, "quantization_config", None)
    if own is not None:
        own = own if isinstance(own, dict) else own.to_dict()
        known = ("block_size", "codebook", "skip_modules")
        quantization = Blockwise8bitConfig(**{k: own[k] for k in known if k in own})
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"config.json describes no model that can be built: {reason}") from None
    try:
        swap_modules(model, quantization, dtype)
    except QuantizationError as error:
        raise UserError(f"config.json: {error}") from None
    for names in getattr(model, "all_tied_weights_keys", {}).items():
        tied, origin = (model.get_submodule(name.removesuffix(".weight")) for name in names)
        if isinstance(tied, Frozen8bitModule) and isinstance(origin, Frozen8bitModule):
            tied.weight = origin.weight
            tied.absmax, tied.codebook = origin.absmax, origin.codebook
    return add_adapter(model, adapter)


def weigh(model: nn.Module, optim: str = "adamw_bnb_8bit") -> Weights:
    """Count the bytes of a model, on the meta device or loaded.

    Args:
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
    """Return the size of an optimizer's two moments for a tensor of so many weights."""
    if optim != "adamw_bnb_8bit" or weights < _SMALL:
        return 8 * weights
    return 2 * (weights + 4 * math.ceil(weights / _OPTIMIZER_BLOCK))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor once, however many modules share it, with what it is."""
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
            elif isinstance(module, Frozen8bitModule) and name in ("absmax", "codebook"):
                kind = "scales"
            else:
                kind = "unquantized"
            yield kind, tensor
