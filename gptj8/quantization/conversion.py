"""Convert a checkpoint to 8 bits, one tensor at a time.

The model is built on the meta device to learn which tensors belong to modules that are stored in 8
bits; weights are then read, quantized and written tensor by tensor, so that memory is bounded by
the largest tensor and one output shard, not by the model. The target appears under its name only
when every file of it is on the disk.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptj8.quantization import original_format
from gptj8.quantization.codec import QuantizedTensor, quantize_blockwise, squared_errors
from gptj8.quantization.layers import Frozen8bitModule
from gptj8.quantization.model_files import build_skeleton, check_model_directory, match_names
from gptj8.quantization.quantizer import Blockwise8bitConfig, is_skipped, swap_modules
from gptj8.quantization.shards import ShardedWeights, ShardWriter
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import (
    format_bytes,
    read_json,
    replace_directory,
    require_free_space,
    write_json,
)
from gptj8.runtime.manifest import MANIFEST, write_manifest
from gptj8.runtime.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_FILES = ("*.index.json", MANIFEST, "config.json")


@dataclass(frozen=True)
class TensorError:
    """How well one tensor survived: `relative_rmse` = |restored - original| / |original|."""

    name: str
    parameters: int
    relative_rmse: float


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        tensors: one entry a quantized tensor, in the order of the model.
        kept: names of modules with weights that stay in full precision, for example LayerNorms.
        dropped: checkpoint tensors that the model has no place for, such as causal masks.
    """

    parameters: int = 0
    source_bytes: int = 0
    converted_bytes: int = 0
    tensors: list[TensorError] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    _squared_error: float = 0.0
    _squared_norm: float = 0.0

    @property
    def relative_rmse(self) -> float:
        """The error over all quantized weights together."""
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def add(self, name: str, weight: torch.Tensor, quantized: QuantizedTensor) -> None:
        """Measure one tensor."""
        error, norm = squared_errors(weight, quantized)
        self._squared_error += error
        self._squared_norm += norm
        relative = math.sqrt(error / norm) if norm else 0.0
        self.tensors.append(TensorError(name, weight.numel(), relative))


def convert_checkpoint(
    source_dir: str | Path, target_dir: str | Path, config: Blockwise8bitConfig
) -> ConversionReport:
    """Write an 8-bit copy of a model directory that `from_pretrained` loads.

    A model in the original 8-bit GPT-J format keeps its codes, and its adapters
    (`gptj8.quantization.original_format`).

    Args:
        source_dir: a causal language model as `save_pretrained` writes it: safetensors or
            pytorch_model.bin, in one file or sharded. Pickles are read as tensors only.
        target_dir: the directory to make; an earlier one is replaced when the new one is complete.
        config: block size, codebook and modules to skip.

    Raises:
        UserError: for a source that is no model, already converted, incomplete or different from
            its config, and for a disk that is too small; `target_dir` is then as it was.
    """
    source, target = Path(source_dir), Path(target_dir)
    check_model_directory(source)
    model_config = read_json(source / "config.json")
    if quantization := model_config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(f"{source} is already quantized ({method}); convert the original model")

    _check_target(target)
    weights = ShardedWeights(source)
    stored = original_format.quantized_modules(weights.shapes)
    if stored:
        block_size = original_format.common_block_size(stored, source)
        config = Blockwise8bitConfig(block_size, "dynamic", config.skip_modules)
    skeleton = build_skeleton(source)
    modules = [name for name, _ in skeleton.named_modules()]
    for skipped in config.skip_modules:
        if not any(is_skipped(name, [skipped]) for name in modules):
            raise UserError(f"skip_modules: {source} has no module {skipped!r}")
    swapped = swap_modules(skeleton, config)
    if not swapped:
        raise UserError(f"{source}: nothing to convert, every module is skipped")
    _refuse_what_stays_large(skeleton, config.skip_modules, source)
    report = ConversionReport(source_bytes=weights.total_bytes)
    names, report.dropped = match_names(weights, skeleton, source)
    require_free_space(target.parent, _estimate_bytes(weights, names, swapped), "the 8-bit model")

    with replace_directory(target) as staging, ShardWriter(staging) as writer:
        with progress(weights.total_bytes, "convert", "bytes") as advance:
            for source_name, tensor in weights:
                advance(tensor.numel() * tensor.element_size())
                name = names.get(source_name)
                if name is None:
                    continue
                report.parameters += tensor.numel()
                module, prefix = name.removesuffix(".weight"), source_name.removesuffix(".weight")
                if prefix in stored:
                    quantized = original_format.take_over(weights, prefix, config.block_size)
                elif module != name and module in swapped:
                    quantized = quantize_blockwise(
                        tensor, config.block_size, config.codebook, name=source_name
                    )
                    report.add(name, tensor, quantized)
                else:
                    report.kept.append(name)
                    writer.add(name, tensor.clone(memory_format=torch.contiguous_format))
                    continue
                writer.add(name, quantized.codes)
                writer.add(f"{module}.absmax", quantized.absmax)
                writer.add(f"{module}.codebook", quantized.codebook)
        writer.finish()
        original_format.save_adapters(staging, weights, skeleton, base_model=str(target))
        _write_side_files(source, staging, model_config, config, writer.digests)
        report.converted_bytes = sum(f.stat().st_size for f in staging.glob("*.safetensors"))
    return report


def _check_target(target: Path) -> None:
    """Refuse before the work what could not be put in place after it."""
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target} is a link to {target.readlink()}, which does not exist")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made: {parent} is a file")


def _refuse_what_stays_large(
    skeleton: PreTrainedModel, skip_modules: list[str], source: Path
) -> None:
    """Refuse a model most of whose weights are in modules that have no 8-bit twin, naming them."""
    large = {}
    for name, module in skeleton.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if own and not isinstance(module, Frozen8bitModule) and not is_skipped(name, skip_modules):
            large[f"{name} ({type(module).__name__})"] = own
    parameters = sum(p.numel() for p in skeleton.parameters())
    share = sum(large.values()) / parameters
    if share > 0.5:
        first = sorted(large, key=lambda name: -large[name])[:3]
        raise UserError(
            f"{source}: {share:.0%} of the weights are in modules that are no Linear, Conv1D or "
            f"Embedding and have no 8-bit form: {', '.join(first)}"
            + (f" and {len(large) - 3} more" if len(large) > 3 else "")
            + "; name them in skip_modules to convert the rest"
        )


def _estimate_bytes(weights: ShardedWeights, names: dict[str, str], swapped: list[str]) -> int:
    quantized = {f"{name}.weight" for name in swapped}
    # A byte a code and a little for absmax, codebooks and headers; four bytes for the rest.
    estimate = 0.0
    for source, name in names.items():
        estimate += math.prod(weights.shapes[source]) * (1.1 if name in quantized else 4)
    return int(estimate)


def _write_side_files(
    source: Path,
    staging: Path,
    model_config: dict[str, Any],
    config: Blockwise8bitConfig,
    digests: Mapping[str, str],
) -> None:
    skipped = {file for pattern in _WEIGHT_FILES for file in source.glob(pattern)}
    for file in {file for pattern in _SIDE_FILES for file in source.glob(pattern)} - skipped:
        shutil.copyfile(file, staging / file.name)
    quantization = json.loads(config.to_json_string(use_diff=False))
    write_json(staging / "config.json", {**model_config, "quantization_config": quantization})
    write_manifest(staging, digests)


def summarize(report: ConversionReport) -> str:
    """Return one line for the terminal."""
    sizes = f"{format_bytes(report.source_bytes)} -> {format_bytes(report.converted_bytes)}"
    error = f"relative RMS error {report.relative_rmse:.3%}" if report.tensors else "codes kept"
    return f"{report.parameters:,} parameters, {sizes}, {error}"
