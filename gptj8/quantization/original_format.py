"""Models published in the original 8-bit GPT-J format: their codes are taken over, not made again.

That format keeps `weight` (uint8), `absmax` and `code` of every linear layer and embedding beside
each other, in blocks of 4096 over the flattened weight, in one pytorch_model.bin, together with the
causal masks of all layers. Where adapters were trained, a layer has `adapter.0.weight` (r, in) and
`adapter.1.weight` (out, r), added without scaling; an embedding's `adapter.0.weight` is (rows, r).
They become a PEFT adapter in the folder `adapter` of the converted model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from gptj8.quantization.codec import BLOCK_SIZES, QuantizedTensor, check_quantized
from gptj8.quantization.shards import ShardedWeights
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import write_json

ADAPTER_FOLDER = "adapter"

_PARTS = ("absmax", "code")
_ADAPTER = (".adapter.0.weight", ".adapter.1.weight")


def quantized_modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the modules of a checkpoint that are in 8 bits already, and their block size.

    Args:
        shapes: of all tensors of the checkpoint, by name.

    Raises:
        UserError: if absmax has a length that no block size explains.
    """
    modules = {}
    for name, shape in shapes.items():
        prefix = name.removesuffix(".weight")
        if name == prefix or any(f"{prefix}.{part}" not in shapes for part in _PARTS):
            continue
        codes, blocks = math.prod(shape), math.prod(shapes[f"{prefix}.absmax"])
        sizes = [size for size in BLOCK_SIZES if math.ceil(codes / size) == blocks]
        if not sizes:
            raise UserError(
                f"{prefix}.absmax has {blocks} values, which no block size gives for the "
                f"{codes} codes of {name}"
            )
        modules[prefix] = sizes[-1]
    return modules


def common_block_size(modules: Mapping[str, int], source: Path) -> int:
    """Return the block size of all modules.

    Raises:
        UserError: if they differ, which the converted format has no place for.
    """
    sizes = {size: module for module, size in modules.items()}
    if len(sizes) > 1:
        listed = ", ".join(f"{module}: {size}" for size, module in sorted(sizes.items()))
        raise UserError(f"{source}: modules in 8 bits have different block sizes ({listed})")
    return next(iter(sizes))


def take_over(weights: ShardedWeights, module: str, block_size: int) -> QuantizedTensor:
    """Return a module's weight as the checkpoint holds it.

    Raises:
        QuantizationError: if codes, absmax and code do not belong together, by the tensor's name.
    """
    codes = weights.read(f"{module}.weight")
    # Copies: in one file all modules may share one code, and what shares memory cannot be saved.
    parts = (weights.read(f"{module}.{part}") for part in _PARTS)
    absmax, code = (part.flatten().to(torch.float32, copy=True) for part in parts)
    check_quantized(codes, absmax, code, block_size, f"{module}.weight")
    return QuantizedTensor(codes, absmax, code, block_size)


def save_adapters(
    target: Path, weights: ShardedWeights, model: torch.nn.Module, base_model: str
) -> None:
    """Write the adapters of a checkpoint, if it has any, in PEFT's format.

    Args:
        target: the converted model's directory; the adapter is its folder `adapter`.
        weights: the checkpoint.
        model: tells embeddings from linear layers; may be on the meta device.
        base_model: where the converted model will be found.
    """
    down, up = _ADAPTER
    modules = [n.removesuffix(down) for n in weights.shapes if n.endswith(down)]
    if not modules:
        return
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        first, second = weights.read(module + down), weights.read(module + up)
        prefix = f"base_model.model.{module}"
        ranks[module] = second.shape[1]
        if isinstance(model.get_submodule(module), torch.nn.Embedding):
            tensors[f"{prefix}.lora_embedding_A"] = first.t().contiguous()
            tensors[f"{prefix}.lora_embedding_B"] = second.contiguous()
        else:
            tensors[f"{prefix}.lora_A.weight"] = first.contiguous()
            tensors[f"{prefix}.lora_B.weight"] = second.contiguous()
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,  # the format adds adapters unscaled
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    folder = target / ADAPTER_FOLDER
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
