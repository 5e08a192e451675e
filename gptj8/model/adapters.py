"""Add trainable weights to a frozen model: LoRA, or the LayerNorm weights only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, write_json
from gptj8.runtime.messages import one_line, suggest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from gptj8.params.sections import Finetune


@dataclass(frozen=True)
class AdapterSpec:
    """Settings of the trainable weights.

    Attributes:
        method: "lora" (Hu et al., arXiv:2106.09685), or "layernorm" to train only the weights of
            the normalization layers (Zhao et al., arXiv:2312.11420).
        target: modules that LoRA adapts: "attention" (PEFT's default projections for the
            architecture; query and value, as in the paper), "all-linear" (all linear layers except
            the head), or a list of module names.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: see `peft.LoraConfig`.
    """

    method: str = "lora"
    target: str | Sequence[str] = "all-linear"
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True

    @classmethod
    def from_params(cls, finetune: Finetune) -> AdapterSpec:
        """Return the settings of the params section `finetune`."""
        return cls(**{item.name: getattr(finetune, item.name) for item in fields(cls)})

    def __str__(self) -> str:
        if self.method != "lora":
            return "LayerNorms"
        names = self.target if isinstance(self.target, str) else ", ".join(self.target)
        return f"LoRA r={self.r} on {names}"


def add_adapter(model: PreTrainedModel, spec: AdapterSpec) -> PeftModel:
    """Freeze the model and add trainable weights in float32.

    Raises:
        UserError: if the architecture has no default modules, or `target` matches no module.
    """
    from peft import get_peft_model

    if spec.method == "lora":
        config = _lora_config(model, spec)
    else:
        config = _layernorm_config(model)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = one_line(error)
        raise UserError(f"finetune.target = {spec.target!r} cannot be adapted: {reason}") from error
    if spec.method == "lora" and spec.init_lora_weights == "orthogonal":
        _make_orthogonal(adapted)
    for parameter in adapted.parameters():
        # 16-bit weights lose small updates, and gradient scaling rejects 16-bit gradients.
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted


def save_adapter(model: PeftModel, folder: str | Path, dtype: torch.dtype) -> None:
    """Write an adapter in PEFT format; equal adapters give byte-identical files.

    PEFT stores module names in sets, whose order differs between processes, so the names are
    sorted. LayerNorm weights are trained in float32, but PEFT loads them in the dtype of the base
    model. They are rounded to that dtype in place before saving, so that the model in memory equals
    the model that is loaded later.

    Args:
        model: model with a trained adapter.
        folder: output directory.
        dtype: dtype of the base model.
    """
    if model.peft_config["default"].peft_type == "LN_TUNING":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    # "auto" may add the weights of embeddings, which are codes here.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    file = Path(folder) / "adapter_config.json"
    content = read_json(file)
    for key, value in content.items():
        if key.endswith("_modules") and isinstance(value, list):
            content[key] = sorted(value)
    write_json(file, content)


def trainable_parameters(model: torch.nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_bytes(model: torch.nn.Module) -> int:
    """Return the size in bytes of the trainable parameters, which are float32."""
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
                f"finetune.target = attention: {architecture} has no default modules; "
                "list the names of its attention projections instead"
            )
        modules = list(DEFAULT_MODULES[architecture])
    else:
        modules = list(spec.target)
        _require_modules(model, modules)
    # PEFT gives orthogonal weights the dtype of the base weights, which are codes here, both now
    # and whenever the adapter is loaded; see `_make_orthogonal`.
    is_orthogonal = spec.init_lora_weights == "orthogonal"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # floats are supported
        lora_dropout=spec.lora_dropout,
        target_modules=modules,
        use_rslora=spec.use_rslora,
        init_lora_weights=True if is_orthogonal else spec.init_lora_weights,
    )


@torch.no_grad()
def _make_orthogonal(model: PeftModel) -> None:
    """Initialize A and B of all linear layers with values whose product B A is zero.

    Let P be every second row of an orthogonal matrix, and Q the other rows. Then A = P^T X and
    B = Y Q, for random X and Y, so B A = Y (Q P^T) X = 0. The method and its scale are those of
    PEFT's `init_lora_weights="orthogonal"`, where embeddings keep the default initial weights too.
    """
    for module in model.modules():
        lora_a: dict[str, torch.nn.Linear] = getattr(module, "lora_A", {})
        lora_b: dict[str, torch.nn.Linear] = getattr(module, "lora_B", {})
        for name in lora_a:
            a, b = lora_a[name].weight, lora_b[name].weight  # (r, in) and (out, r)
            rank = a.shape[0]
            orthogonal, _ = torch.linalg.qr(torch.randn(rank, rank))
            a.copy_(torch.randn(a.shape[1], rank // 2).mm(orthogonal[0::2]).T / 10)
            b.copy_(torch.randn(rank // 2, b.shape[0]).T.mm(orthogonal[1::2]) / 10)


def _require_modules(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Raise UserError if a name matches no module; PEFT ignores it beside one that does."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    adaptable = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    known = {n.rpartition(".")[2]: 0 for n, m in model.named_modules() if isinstance(m, adaptable)}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"finetune.target: the model has no module {target}{suggest(target, list(known))}; "
                f"its linear layers and embeddings: {', '.join(known)}"
            )


def _layernorm_config(model: PreTrainedModel) -> PeftConfig:
    from peft import LNTuningConfig

    # Found by class, because PEFT's table covers only a few architectures.
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    ]
    if not norms:
        raise UserError(f"finetune.method = layernorm: {model.config.model_type} has no LayerNorm")
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
