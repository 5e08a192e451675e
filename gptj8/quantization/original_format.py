"""Read models published in the original 8-bit GPT-J format, keeping their codes.

The format stores `weight` (uint8), `absmax` and `code` of every linear layer and embedding, in
blocks of 4096 over the flattened weight. They are in one pytorch_model.bin, which also contains the
causal masks of all layers. A layer with a trained adapter also has `adapter.0.weight` (r, in) and
`adapter.1.weight` (out, r), which are added without scaling; for an embedding, `adapter.0.weight`
is (rows, r). Adapters are written as a PEFT adapter to the folder `adapter` of the converted model.
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
    """Return the modules of a checkpoint that are already in 8 bits, with their block sizes.

    Args:
        shapes: shapes of all tensors of the checkpoint by name.

    Raises:
        UserError: if the length of an absmax matches no supported block size.
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
                f"{prefix}.absmax has {blocks} values, which matches no supported block size for "
                f"the {codes} codes of {name}"
            )
        modules[prefix] = sizes[-1]
    return modules


def common_block_size(modules: Mapping[str, int], source: Path) -> int:
    """Return the block size that all modules share.

    Raises:
        UserError: if the block sizes differ; the converted format supports only one.
    """
    sizes = {size: module for module, size in modules.items()}
    if len(sizes) > 1:
        listed = ", ".join(f"{module}: {size}" for size, module in sorted(sizes.items()))
        raise UserError(
            f"{source}: the 8-bit modules have different block sizes ({listed}), which is not "
            "supported"
        )
    return next(iter(sizes))


def take_over(weights: ShardedWeights, module: str, block_size: int) -> QuantizedTensor:
    """Return the weight of a module with the codes, absmax and codebook of the checkpoint.

    Raises:
        QuantizationError: if codes, absmax and code do not match; the message names the tensor.
    """
    codes = weights.read(f"{module}.weight")
    # Copy them: all modules in a file may share one code, and tensors that share memory cannot be
    # saved.
    parts = (weights.read(f"{module}.{part}") for part in _PARTS)
    absmax, code = (part.flatten().to(torch.float32, copy=True) for part in parts)
    check_quantized(codes, absmax, code, block_size, f"{module}.weight")
    return QuantizedTensor(codes, absmax, code, block_size)


def save_adapters(
    target: Path, weights: ShardedWeights, model: torch.nn.Module, base_model: str
) -> None:
    """Write the adapters of a checkpoint, if it has any, in PEFT's format.

    Args:
        target: directory of the converted model; the adapter is written to its folder `adapter`.
        weights: the checkpoint.
        model: used to distinguish embeddings from linear layers; may be on the meta device.
        base_model: final path of the converted model.
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
        "lora_alpha": rank,  # a scaling of 1, because the format does not scale adapters
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    folder = target / ADAPTER_FOLDER
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
