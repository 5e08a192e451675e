"""A model directory and the model that its config.json describes, compared tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptj8.quantization.layers import Frozen8bitModule
from gptj8.quantization.quantizer import QUANT_METHOD, Blockwise8bitConfig, swap_modules
from gptj8.quantization.shards import ShardedWeights
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT_PATTERNS = ("*.safetensors*", "pytorch_model*.bin*")


def check_model_directory(path: str | Path) -> None:
    """Refuse a directory that is no model, before a library does so at length.

    Raises:
        UserError: naming what is absent.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; a model is one, as save_pretrained writes it")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; is it a model as save_pretrained writes it?")
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise UserError(f"{path}/config.json names no model_type")
    if not any(file for pattern in _WEIGHT_PATTERNS for file in path.glob(pattern)):
        raise UserError(f"{path} has no weights: neither *.safetensors nor pytorch_model*.bin")


def check_tensors(path: str | Path) -> None:
    """Compare a model directory's tensors with what its config.json implies, by their headers.

    Raises:
        UserError: naming file, tensor and the two shapes, or what is missing or cannot be read.
    """
    path = Path(path)
    skeleton = build_skeleton(path)
    quantization = read_json(path / "config.json").get("quantization_config")
    weights = ShardedWeights(path)
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        swap_modules(skeleton, Blockwise8bitConfig(**quantization))
        missing = [
            f"{name}.{part}"
            for name, module in skeleton.named_modules()
            if isinstance(module, Frozen8bitModule) and f"{name}.weight" in weights.shapes
            for part in ("absmax", "codebook")
            if f"{name}.{part}" not in weights.shapes
        ]
        if missing:
            raise UserError(
                "\n".join(f"{path}: the checkpoint has no tensor {name}" for name in missing[:5])
            )
    match_names(weights, skeleton, path)


def build_skeleton(source: Path) -> PreTrainedModel:
    """Return the model that config.json describes, on the meta device.

    Raises:
        UserError: if transformers knows no causal language model for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (
        ValueError,
        KeyError,
        AttributeError,
        OSError,
        RuntimeError,
        TypeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} is not a causal language model: {reason}") from error


def match_names(
    weights: ShardedWeights, skeleton: PreTrainedModel, source: Path
) -> tuple[dict[str, str], list[str]]:
    """Map names of tensors in the files to the model's.

    Args:
        weights: of the files.
        skeleton: the model on the meta device, its modules swapped where they are in 8 bits.
        source: the model directory, for messages.

    Returns:
        name in the files -> name in the model, and the names that the model has no place for.

    Raises:
        UserError: a line for each tensor that is missing or has another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = skeleton.all_tied_weights_keys
    names: dict[str, str] = {}
    dropped: list[str] = []
    problems = []
    for name, shape in weights.shapes.items():
        match = _model_name(name, skeleton, expected)
        if match is None:
            dropped.append(name)
        elif expected[match] != shape:
            problems.append(
                f"{weights.file_of[name]}: {name} has shape {shape}, and config.json implies "
                f"{expected[match]}"
            )
        else:
            names[name] = match
    found = {match: name for name, match in names.items()}
    for target, origin in tied.items():
        if target in found and origin in found:
            # Files of torch hold a shared weight twice; it is stored once.
            if not torch.equal(weights.read(found[target]), weights.read(found[origin])):
                problems.append(
                    f"{source}: config.json ties {found[target]} to {found[origin]}, and the "
                    "checkpoint has two different tensors; set tie_word_embeddings to false"
                )
            dropped.append(found[target])
            del names[found[target]]
        elif target in found:
            names[found[target]] = origin
    made_here = {
        f"{name}.{part}"
        for name, module in skeleton.named_modules()
        if isinstance(module, Frozen8bitModule)
        for part in ("absmax", "codebook")
    }
    for missing in sorted(set(expected) - made_here - set(tied) - set(names.values())):
        problems.append(f"{source}: the checkpoint has no tensor {missing}")
    if problems:
        shown = problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else [])
        raise UserError("\n".join(shown))
    return names, dropped


def _model_name(
    name: str, skeleton: PreTrainedModel, expected: dict[str, tuple[int, ...]]
) -> str | None:
    """Return what the model calls a tensor of the checkpoint; None if it has no place for it.

    SavedStates of before a renaming in transformers, or of the model without its head, have other
    names; transformers' own table is asked.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if name in expected:
        return name
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = skeleton.base_model_prefix
    renamed, computed = rename_source_key(name, renamings, converters, prefix, expected)
    if computed is not None:
        raise UserError(
            f"{type(skeleton).__name__} computes {renamed} from several tensors of the checkpoint, "
            f"{name} among them, which the conversion does not do; load the model with "
            "transformers, save it again, and convert that"
        )
    return renamed if renamed in expected else None
