"""Put trainable weights on a frozen model: LoRA, or the LayerNorms alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, write_json

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from gptj8.params.sections import Finetune


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained.

    Attributes:
        method: "lora" (Hu et al., arXiv:2106.09685), or "layernorm": train only the normalization
            layers' weights (Zhao et al., arXiv:2312.11420).
        target: for LoRA: "attention" (the projections that PEFT adapts by default for the
            architecture, as in the paper: query and value), "all-linear" (all but the head), or
            names of modules.
        r, lora_alpha, lora_dropout: see `peft.LoraConfig`.
    """

    method: str = "lora"
    target: str | Sequence[str] = "all-linear"
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    @classmethod
    def from_params(cls, finetune: Finetune) -> AdapterSpec:
        """Return what the params' section `finetune` asks for."""
        return cls(
            finetune.method, finetune.target, finetune.r, finetune.lora_alpha, finetune.lora_dropout
        )

    def __str__(self) -> str:
        if self.method != "lora":
            return "LayerNorms"
        names = self.target if isinstance(self.target, str) else ", ".join(self.target)
        return f"LoRA r={self.r} on {names}"


def add_adapter(model: PreTrainedModel, spec: AdapterSpec) -> PeftModel:
    """Freeze the model and add trainable weights in float32.

    Raises:
        UserError: if the architecture has no default or no module has a name in `target`.
    """
    from peft import get_peft_model

    if spec.method == "lora":
        config = _lora_config(model, spec)
    else:
        config = _layernorm_config(model)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"finetune.target = {spec.target!r} cannot be adapted: {reason}") from error
    for parameter in adapted.parameters():
        # 16-bit weights lose small updates, and gradient scaling refuses 16-bit gradients.
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted


def save_adapter(model: PeftModel, folder: str | Path, dtype: torch.dtype) -> None:
    """Write an adapter in PEFT's format; the same one gives the same bytes.

    PEFT keeps names of modules in sets, whose order is another one in each process. LayerNorms are
    trained in float32, and PEFT loads them in the base's dtype: they are rounded to it first, in
    place, so that the model that is measured and handed over is the one that answers here.

    Args:
        dtype: of the base.
    """
    if model.peft_config["default"].peft_type == "LN_TUNING":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder))
    file = Path(folder) / "adapter_config.json"
    content = read_json(file)
    for key, value in content.items():
        if key.endswith("_modules") and isinstance(value, list):
            content[key] = sorted(value)
    write_json(file, content)


def trainable_parameters(model: torch.nn.Module) -> int:
    """Return how many weights are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_bytes(model: torch.nn.Module) -> int:
    """Return the size of the trained weights, which are float32."""
    return 4 * trainable_parameters(model)


def _lora_config(model: PreTrainedModel, spec: AdapterSpec) -> PeftConfig:
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_MODULES

    if spec.target == "all-linear":
        modules: str | list[str] = "all-linear"
    elif spec.target == "attention":
        architecture = model.config.model_type
        if architecture not in DEFAULT_MODULES:
            raise UserError(
                f"finetune.target = attention is not known for {architecture}; "
                "list the names of its attention's linear layers instead"
            )
        modules = list(DEFAULT_MODULES[architecture])
    else:
        modules = list(spec.target)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # a float works
        lora_dropout=spec.lora_dropout,
        target_modules=modules,
    )


def _layernorm_config(model: PreTrainedModel) -> PeftConfig:
    from peft import LNTuningConfig

    # By class and not by PEFT's table, which knows a few architectures only.
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    ]
    if not norms:
        raise UserError(f"finetune.method = layernorm: {model.config.model_type} has no LayerNorm")
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
