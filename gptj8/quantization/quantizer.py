"""The transformers quantizer for loading and saving models with 8-bit weights.

`from_pretrained` builds the model on the meta device, calls the quantizer to replace modules, and
loads the checkpoint into the result. A converted checkpoint contains `weight` (uint8), `absmax`,
`codebook` and `levels` of each module and needs no further steps. For an ordinary checkpoint loaded
with a `quantization_config`, each weight is quantized while it is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from gptj8.quantization.checkpoint_form import (
    Unflatten,
    check_dtypes,
    names_of_rows,
    require_loaded,
    unflattens,
)
from gptj8.quantization.codec import (
    CODEBOOKS,
    QuantizationError,
    QuantizedTensor,
    check_block_size,
    check_quantized,
    check_scale_bits,
    quantize_blockwise,
)
from gptj8.quantization.layers import QUANTIZED_BUFFERS, Frozen8bitEmbedding, Frozen8bitModule
from gptj8.quantization.twins import frozen_twin, full_precision_twin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptj8.params.sections import Quantization

QUANT_METHOD = "blockwise_8bit"
# Keys that transformers adds to every saved quantization_config.
_FOREIGN_SETTINGS = {"quant_method", "modules_to_not_convert"}


@register_quantization_config(QUANT_METHOD)
class Blockwise8bitConfig(QuantizationConfigMixin):
    """Configuration of 8-bit weights, saved in the config.json of a converted model.

    Args:
        block_size: number of weights that share one scale, a power of two from 32 to 4096.
        codebook: "fitted" (to each tensor) or "dynamic" (bitsandbytes' map).
        skip_modules: modules to leave unquantized, given as complete or partial dotted names. The
            children of a skipped module are skipped too.
        embedding_block_size: block size of embeddings and the language-model head, whose errors
            contribute most.
        scale_bits: 8, or 32 for scales in float32.
        input_scales: whether matrices have scales per input column, from calibration text. Only
            `convert_checkpoint` can make them.

    Raises:
        QuantizationError: if a block size, the codebook or scale_bits is not supported.
    """

    def __init__(
        self,
        block_size: int = 128,
        codebook: str = "fitted",
        skip_modules: list[str] | None = None,
        embedding_block_size: int = 32,
        scale_bits: int = 8,
        input_scales: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(quant_method=QUANT_METHOD)  # type: ignore[arg-type]
        if unknown := set(kwargs) - _FOREIGN_SETTINGS:
            raise QuantizationError(f"{min(unknown)} is not a setting of 8-bit weights")
        if isinstance(skip_modules, str):
            raise QuantizationError(f"skip_modules = {skip_modules!r} is not a list of names")
        check_block_size(block_size)
        check_block_size(embedding_block_size, "embedding_block_size")
        check_scale_bits(scale_bits)
        if codebook not in CODEBOOKS:
            raise QuantizationError(f"codebook = {codebook!r} is not one of {', '.join(CODEBOOKS)}")
        self.block_size = block_size
        self.codebook = codebook
        self.skip_modules = list(skip_modules or [])
        self.embedding_block_size = embedding_block_size
        self.scale_bits = scale_bits
        self.input_scales = input_scales

    @classmethod
    def from_params(cls, quantization: Quantization) -> Blockwise8bitConfig:
        """Return the config that the params' section describes."""
        settings = quantization.model_dump()
        calibration = settings.pop("calibration")
        settings["skip_modules"] = list(quantization.skip_modules)
        return cls(**settings, input_scales=calibration is not None)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config saved in a config.json; older ones have one block size and float32
        scales."""
        if "scale_bits" not in config_dict and "block_size" in config_dict:
            size = config_dict["block_size"]
            config_dict = {**config_dict, "embedding_block_size": size, "scale_bits": 32}
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


@register_quantizer(QUANT_METHOD)
class Blockwise8bitQuantizer(HfQuantizer):
    """Replaces modules by their frozen versions before the weights are loaded."""

    quantization_config: Blockwise8bitConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # Imported here because it imports model classes, whose own import may have led here.
        from gptj8.kernels.fused import register_fused_attention

        # This method runs before the model is built, so the attention can still be selected.
        register_fused_attention()

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            if config.input_scales:
                raise QuantizationError(
                    "input_scales = True needs a calibration text; convert the model with gptj8 "
                    "convert --calibration"
                )
        heads = [name for name in _task_heads(model) if name not in config.skip_modules]
        config.skip_modules = [*config.skip_modules, *heads]
        swap_modules(model, config, dtype or _dtype_of(model))
        for tied, _ in tied_modules(model):
            tied.share_scales()
        check_dtypes(model, checkpoint_files or [], self.pre_quantized)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return the operation that gives stored codes the shape of the weight."""
        return [WeightConverter("weight", "weight", [Unflatten()])] if self.pre_quantized else []

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the tensors to save."""
        state = model.state_dict()
        for name in names_of_rows(model):
            state[name] = state[name].detach().reshape(-1)
        return state, {}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # Saving the model must not reverse the operation; see `get_state_dict_and_metadata`.
        conversions: Any = getattr(model, "_weight_conversions", None) or []
        kept = [c for c in conversions if not unflattens(c)]
        setattr(model, "_weight_conversions", kept or None)  # noqa: B010 (the type is transformers')
        for tied, origin in tied_modules(model):
            tied.use_scales_of(origin)
        from transformers import PreTrainedModel

        for inner in model.modules():  # the inner model of a causal one can be saved by itself
            if isinstance(inner, PreTrainedModel):
                inner.hf_quantizer = self  # type: ignore[assignment]
        # Check the tensors before they are passed to native code.
        for name, module in model.named_modules():
            if not isinstance(module, Frozen8bitModule):
                continue
            if module.weight.device.type == "meta":
                if not self.pre_quantized:
                    raise QuantizationError(
                        f"{name} is on the disk (device_map) and cannot be quantized while it is "
                        "loaded; convert the model first with gptj8 convert"
                    )
            else:
                require_loaded(name, module)
                parts = (module.weight, module.absmax, module.codebook)
                check_quantized(*parts, module.block_size, f"{name}.weight", module.levels)
        return model

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        name = converter.target_patterns[0]
        # `from_pretrained(dtype=torch.bfloat16)` would round absmax and codebook as well.
        if name.rpartition(".")[2] in QUANTIZED_BUFFERS:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:  # otherwise transformers would not check the shapes of the tensors
            return False
        module, tensor_name = get_module_from_name(model, param_name)
        return isinstance(module, Frozen8bitModule) and tensor_name == "weight"

    @property
    def quantized_element_size(self) -> float:
        config = self.quantization_config
        return 1 + config.scale_bits / 8 / config.block_size

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self.quantization_config)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        if isinstance(dtype, str):  # `save_pretrained` writes the dtype's name into the config
            dtype = getattr(torch, dtype)
        return restore_modules(model, dtype or torch.get_default_dtype())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _QuantizeOnLoad(ConversionOps):
    """Converts a full-precision `weight` to the tensors of a frozen module during loading."""

    def __init__(self, config: Blockwise8bitConfig) -> None:
        self.config = config

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name or "weight"
        prefix = name.removesuffix("weight")
        module = kwargs["model"].get_submodule(prefix.removesuffix("."))
        quantized = quantize_for(module, weight, self.config, name)
        parts = {f"{prefix}{part}": getattr(quantized, part) for part in module.buffer_names}
        if missing_keys is not None:
            missing_keys -= set(parts)
        return {name: quantized.codes, **parts}


def quantize_for(
    module: Frozen8bitModule, weight: torch.Tensor, config: Blockwise8bitConfig, name: str
) -> QuantizedTensor:
    """Quantize the weight of a frozen module.

    Args:
        weight: in full precision.
        name: name of the weight in error messages.
    """
    return quantize_blockwise(
        module.scaled(weight),
        module.block_size,
        config.codebook,
        name=name,
        scale_bits=config.scale_bits,
    )


def swap_modules(
    model: nn.Module, config: Blockwise8bitConfig, dtype: torch.dtype | None = None
) -> list[str]:
    """Replace modules by their frozen 8-bit versions, in place, and return the modules' names.

    Activation functions with a fused version in torch are replaced as well.

    Args:
        dtype: dtype of biases and embedding outputs; None for torch's default.
    """
    from gptj8.kernels.fused import fuse_activations

    twins = {}
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    for name, module in model.named_modules():
        if not is_skipped(name, config.skip_modules):
            is_embedding = isinstance(module, nn.Embedding) or module is head
            size = config.embedding_block_size if is_embedding else config.block_size
            twin = frozen_twin(module, size, dtype, config.scale_bits)
            if twin is not None:
                twins[name] = twin.train(module.training)
    # Modules that share a weight are either all in 8 bits or all unquantized.
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        tied = [name.removesuffix(".weight") for name in pair]
        if not all(name in twins for name in tied):
            for name in tied:
                twins.pop(name, None)
    _keep_one_floating_parameter(model, twins)
    for name, twin in twins.items():
        model.set_submodule(name, twin)
        if config.input_scales and not isinstance(twin, Frozen8bitEmbedding):
            cast(Frozen8bitModule, twin).allocate_input_scales()
    if config.input_scales:
        for module, origin in tied_modules(model):
            if module.input_scales is not None:
                origin.allocate_input_scales()
    fuse_activations(model)
    return list(twins)


def _task_heads(model: nn.Module) -> list[str]:
    """Return the names of modules outside the base model, if the model predicts no tokens.

    A checkpoint of a language model has no weights for them: they are new and will be trained.
    """
    base, head = getattr(model, "base_model", model), getattr(model, "get_output_embeddings", None)
    if base is model or head is None or head() is not None:
        return []
    inside = set(map(id, base.modules()))
    return [name for name, module in model.named_modules() if name and id(module) not in inside]


def _keep_one_floating_parameter(model: nn.Module, twins: dict[str, nn.Module]) -> None:
    """Leave the smallest matrix unquantized if no other parameter is a floating-point number.

    transformers reads a model's dtype from its parameters. OLMo has neither biases nor weights of
    normalization layers.
    """
    weights = {name: model.get_parameter(f"{name}.weight") for name in twins}
    frozen = set(map(id, weights.values()))
    if any(p.is_floating_point() and id(p) not in frozen for p in model.parameters()):
        return
    matrices = [name for name in twins if isinstance(model.get_submodule(name), nn.Linear)]
    if matrices and len(twins) > 1:
        del twins[min(matrices, key=lambda name: weights[name].numel())]


def restore_modules(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace all frozen modules by ordinary ones with restored weights, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Frozen8bitModule):
            model.set_submodule(name, full_precision_twin(module, dtype))
    model.to(dtype)  # type: ignore[arg-type]
    model.tie_weights()
    return model


def is_skipped(name: str, skip_modules: list[str]) -> bool:
    """Return whether `skip_modules` contains consecutive components of a module's dotted name.

    This covers the complete name, its last parts, and the names of its parents.
    """
    dotted = f".{name}."
    return any(f".{skipped}." in dotted for skipped in skip_modules)


def tied_modules(model: nn.Module) -> list[tuple[Frozen8bitModule, Frozen8bitModule]]:
    """Return pairs of frozen modules: a module with a tied weight, and the one it is tied to."""
    pairs = []
    for names in getattr(model, "all_tied_weights_keys", {}).items():
        if not all(name.endswith(".weight") for name in names):
            continue  # BERT ties biases too
        tied, origin = (model.get_submodule(name.removesuffix(".weight")) for name in names)
        if isinstance(tied, Frozen8bitModule) and isinstance(origin, Frozen8bitModule):
            pairs.append((tied, origin))
    return pairs


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
