"""The methods of `benchmarks.compare`: the same model with different storage of its weights.

gptj8                this project: 8-bit weights, its kernels, attention and loss
gptj8-selective      gptj8 with selective checkpointing, which recomputes only cheap operations
bfloat16             stock transformers and PEFT; the baseline of the comparison
jit-bitsandbytes     the original 8-bit GPT-J method, reimplemented with bitsandbytes' operators
llm-int8, nf4        bitsandbytes' own layers
torchao              int8 weight-only, if the package is installed

Two more are references for the deviation: `float32`, and `restored`, the 8-bit weights of gptj8
restored to float32.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import GPTJConfig

METHODS = (
    "gptj8",
    "gptj8-selective",
    "bfloat16",
    "jit-bitsandbytes",
    "llm-int8",
    "nf4",
    "torchao",
)
BASE = "bfloat16"
DTYPE = torch.bfloat16


class _JustInTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, absmax, code):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, absmax, code)
        return nn.functional.linear(x, _restore(codes, absmax, code))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad @ _restore(*ctx.saved_tensors), None, None, None


def _restore(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 4096, DTYPE)


class JustInTimeLinear(nn.Linear):
    """The layer of the original method: bitsandbytes codes, restored in forward and backward."""

    def __init__(self, original: nn.Linear) -> None:
        from bitsandbytes.functional import create_dynamic_map

        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        code = create_dynamic_map().float().to(original.weight.device)
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(original.weight, code, 4096)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", absmax.float())
        self.register_buffer("code", code)
        self.bias = original.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _JustInTime.apply(x, self.weight, self.absmax, self.code)
        return y if self.bias is None else y + self.bias


def config(layers: int, positions: int = 2048) -> GPTJConfig:
    """Return the config of GPT-J-6B with the given numbers of layers and positions."""
    from transformers import GPTJConfig

    return GPTJConfig(n_layer=layers, n_positions=positions, tie_word_embeddings=False)


def build(
    method: str, layers: int, device: torch.device, positions: int = 2048
) -> tuple[nn.Module, float]:
    """Return the model converted by a method, with an adapter, and the conversion time in seconds.

    The original weights are always the same.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import GPTJForCausalLM

    is_ours = method.startswith("gptj8")
    if is_ours:
        from gptj8.kernels.fused import register_fused_attention

        register_fused_attention()
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    model = GPTJForCausalLM(config(layers, positions))
    torch.set_default_dtype(torch.float32)
    finish(device)  # also initializes a GPU
    begun = time.perf_counter()
    _convert(method, model, device)
    model.to(device)
    finish(device)
    seconds = time.perf_counter() - begun
    torch.manual_seed(0)
    model = get_peft_model(
        model.requires_grad_(False), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    ).to(device)
    if is_ours:
        from gptj8.training.activation_checkpointing import set_checkpointing

        set_checkpointing(model, "selective" if method == "gptj8-selective" else "full")
    else:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model, seconds


def finish(device: torch.device) -> None:
    """Wait for pending GPU operations."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _convert(method: str, model: nn.Module, device: torch.device) -> None:
    """Convert the weights one by one, so that the device need not hold all original weights."""
    if method == "bfloat16":
        return
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), device=device)
        return
    if method in ("float32", "restored"):
        model.float()
        if method == "restored":
            _round(model)
        return
    from bitsandbytes import nn as bnb

    for name, module in list(model.named_modules()):
        if method.startswith("gptj8"):
            from gptj8.quantization.codec import quantize_blockwise
            from gptj8.quantization.twins import frozen_twin

            twin: Any = frozen_twin(module, 4096, DTYPE)
            if twin is None:
                continue
            twin = twin.to(device)
            twin.load_quantized(quantize_blockwise(module.weight.to(device)))
            if getattr(module, "bias", None) is not None:
                twin.bias = module.bias
        elif type(module) is not nn.Linear:
            continue
        elif method == "jit-bitsandbytes":
            twin = JustInTimeLinear(module.to(device))
        elif name == "lm_head":  # bitsandbytes does not convert the head
            continue
        else:
            shape = (module.in_features, module.out_features, module.bias is not None)
            if method == "llm-int8":
                twin = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
            else:
                twin = bnb.Linear4bit(*shape, quant_type="nf4", compute_dtype=DTYPE)
            twin.load_state_dict(module.state_dict())
            twin = twin.to(device)
        model.set_submodule(name, twin)
    if method.startswith("gptj8"):
        from gptj8.kernels.fused import fuse_activations

        fuse_activations(model)


def _round(model: nn.Module) -> None:
    """Replace each large weight by its quantized and restored values."""
    from gptj8.quantization.codec import dequantize_blockwise, quantize_blockwise
    from gptj8.quantization.twins import frozen_twin

    for module in model.modules():
        if frozen_twin(module, 4096, None) is not None:
            weight: Any = module.weight
            weight.data = dequantize_blockwise(quantize_blockwise(weight), torch.float32)


def load(method: str, original: Path, converted: Path, device: torch.device) -> nn.Module:
    """Load a model from a folder in the usual way of each method.

    Args:
        method: one of `METHODS`.
        original: folder with bfloat16 weights, which the other methods quantize while loading.
        converted: folder written by `gptj8.convert_checkpoint`.
        device: device to load the model to.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if method.startswith("gptj8"):
        from gptj8.model.loading import load_model

        return load_model(converted, DTYPE, device)
    quantization: Any = None
    if method == "llm-int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif method == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE
        )
    elif method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    elif method == "jit-bitsandbytes":
        model = AutoModelForCausalLM.from_pretrained(original, dtype=DTYPE)
        _convert(method, model, device)
        return model.to(device)
    return AutoModelForCausalLM.from_pretrained(
        original, dtype=DTYPE, quantization_config=quantization, device_map={"": device}
    )


def training_loss(method: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over a sequence; for gptj8 it is computed as in its trainer."""
    if not method.startswith("gptj8"):
        return model(input_ids=ids, labels=ids).loss
    from gptj8.training.loss import frozen_cross_entropy, frozen_head, input_of

    head = frozen_head(model)
    assert head is not None
    with input_of(head) as taken:
        model(input_ids=ids)
    return frozen_cross_entropy(taken[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten(), head) / (
        ids.numel() - 1
    )
