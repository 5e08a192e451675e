"""Compare the tensors in a model directory with the model that its config.json describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptj8.quantization.layers import Frozen8bitModule
from gptj8.quantization.quantizer import QUANT_METHOD, Blockwise8bitConfig, swap_modules
from gptj8.quantization.shards import ShardedWeights
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json
from gptj8.runtime.messages import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT_PATTERNS = ("*.safetensors*", "pytorch_model*.bin*")


def check_model_directory(path: str | Path) -> None:
    """Check that a directory contains a model, to replace a library's long traceback by one line.

    Raises:
        UserError: if the directory, its config.json, the model_type or the weights are missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a directory; pass a model directory as written by save_pretrained"
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json; pass a model directory as written by save_pretrained"
        )
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or not config.get("model_type"):
        raise UserError(f"{path}/config.json has no model_type")
    if not any(file for pattern in _WEIGHT_PATTERNS for file in path.glob(pattern)):
        raise UserError(f"{path} has no weights: neither *.safetensors nor pytorch_model*.bin")


def check_tensors(path: str | Path) -> None:
    """Check names and shapes of a model directory's tensors against its config.json.

    Only file headers are read.

    Raises:
        UserError: if a tensor is missing or has another shape, or a file cannot be read.
    """
    path = Path(path)
    skeleton = build_skeleton(path)
    quantization = read_json(path / "config.json").get("quantization_config")
    weights = ShardedWeights(path)
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        swap_modules(skeleton, Blockwise8bitConfig.from_dict(quantization))
        missing = [
            f"{name}.{part}"
            for name, module in skeleton.named_modules()
            if isinstance(module, Frozen8bitModule) and f"{name}.weight" in weights.shapes
            for part in module.buffer_names
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
        UserError: if transformers has no causal language model for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # any config, with any reason not to be a model
        reason = one_line(error)
        raise UserError(f"{source} is not a causal language model: {reason}") from error


def match_names(
    weights: ShardedWeights, skeleton: PreTrainedModel, source: Path
) -> tuple[dict[str, str], list[str]]:
    """Map the tensor names in the files to the names in the model.

    Args:
        weights: the tensors in the files.
        skeleton: the model on the meta device, with the modules that are in 8 bits replaced.
        source: the model directory, for error messages.

    Returns:
        A dict from names in the files to names in the model, and the list of names in the files
        that the model does not use.

    Raises:
        UserError: if tensors are missing or have another shape; the message has one line for each
            of the first five.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    coded = {
        f"{name}.weight": (module.weight.numel(),)
        for name, module in skeleton.named_modules()
        if isinstance(module, Frozen8bitModule)
    }
    tied = skeleton.all_tied_weights_keys
    names: dict[str, str] = {}
    dropped: list[str] = []
    problems = []
    misshapen = set()
    for name, shape in weights.shapes.items():
        match = _model_name(name, skeleton, expected)
        if match is None:
            dropped.append(name)
        elif shape not in (expected[match], coded.get(match)):
            misshapen.add(match)
            problems.append(
                f"{weights.file_of[name]}: {name} has shape {shape}, but config.json implies "
                f"{expected[match]}"
            )
        else:
            names[name] = match
    found = {match: name for name, match in names.items()}
    for target, origin in tied.items():
        if target in found and origin in found:
            # torch files contain a shared weight twice; the converted model stores it once.
            if not torch.equal(weights.read(found[target]), weights.read(found[origin])):
                problems.append(
                    f"{source}: config.json ties {found[target]} to {found[origin]}, but their "
                    "tensors in the checkpoint differ; set tie_word_embeddings to false"
                )
            dropped.append(found[target])
            del names[found[target]]
        elif target in found:
            names[found[target]] = origin
    made_here = {
        f"{name}.{part}"
        for name, module in skeleton.named_modules()
        if isinstance(module, Frozen8bitModule)
        for part in module.buffer_names
    }
    present = {*made_here, *tied, *misshapen, *names.values()}
    for missing in sorted(set(expected) - present):
        problems.append(f"{source}: the checkpoint has no tensor {missing}")
    if problems:
        shown = problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else [])
        raise UserError("\n".join(shown))
    return names, dropped


def _model_name(
    name: str, skeleton: PreTrainedModel, expected: dict[str, tuple[int, ...]]
) -> str | None:
    """Return the model's name for a tensor of the checkpoint, or None if the model does not use it.

    Names differ in checkpoints of older transformers versions and of models without a head. They
    are looked up in transformers' own table of renamed tensors.
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
            f"including {name}, which the conversion does not support"
        )
    return renamed if renamed in expected else None
