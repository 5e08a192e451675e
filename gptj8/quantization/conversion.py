"""Convert a checkpoint to 8 bits, one tensor at a time.

The model is built on the meta device to find out which tensors belong to modules that are stored in
8 bits. Weights are then read, quantized and written tensor by tensor, so memory use depends on the
largest tensor and the output shards, not on the size of the model. The target directory appears
only when all its files are on disk.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptj8.quantization import original_format
from gptj8.quantization.calibration import choose_scales, input_sizes, read_sequences
from gptj8.quantization.checkpoint_form import names_of_rows
from gptj8.quantization.codec import QuantizedTensor, squared_errors
from gptj8.quantization.layers import CodesUsedAsWeightsError, Frozen8bitModule
from gptj8.quantization.model_files import build_skeleton, check_model_directory, match_names
from gptj8.quantization.proof import NotProvenError, difference
from gptj8.quantization.quantizer import (
    Blockwise8bitConfig,
    is_skipped,
    quantize_for,
    swap_modules,
)
from gptj8.quantization.shards import ShardedWeights, ShardWriter
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import (
    format_bytes,
    read_json,
    replace_directory,
    require_free_space,
    temporary_sibling,
    write_json,
)
from gptj8.runtime.manifest import MANIFEST, write_manifest
from gptj8.runtime.messages import counted, suggest
from gptj8.runtime.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_FILES = ("*.index.json", MANIFEST, "config.json")


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorError:
    """The quantization error of a tensor: `relative_rmse` = |restored - original| / |original|.

    With scales per input column, both are divided by them.
    """

    name: str
    parameters: int
    relative_rmse: float


@dataclass
class ConversionReport:
    """The result of a conversion.

    Attributes:
        tensors: one entry per quantized tensor, in the order of the checkpoint.
        kept: names of tensors that stay in full precision, for example LayerNorm weights.
        dropped: names of checkpoint tensors that the model does not use, such as causal masks.
        rounded: names of float64 tensors, which are rounded to float32 first.
        unproven: why the 8-bit form could not be proven on a small copy (`proof`), or None.
    """

    parameters: int = 0
    source_bytes: int = 0
    converted_bytes: int = 0
    tensors: list[TensorError] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    unproven: str | None = None
    _squared_error: float = 0.0
    _squared_norm: float = 0.0

    @property
    def relative_rmse(self) -> float:
        """The relative RMS error over all quantized weights."""
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def add(self, name: str, weight: torch.Tensor, quantized: QuantizedTensor) -> None:
        """Measure the error of a tensor and add it to the report."""
        error, norm = squared_errors(weight, quantized)
        self._squared_error += error
        self._squared_norm += norm
        relative = math.sqrt(error / norm) if norm else 0.0
        self.tensors.append(TensorError(name, weight.numel(), relative))


def convert_checkpoint(
    source_dir: str | Path,
    target_dir: str | Path,
    config: Blockwise8bitConfig,
    calibration: str | Path | None = None,
) -> ConversionReport:
    """Write an 8-bit copy of a model directory, which `from_pretrained` can load.

    A model in the original 8-bit GPT-J format keeps its codes and adapters
    (`gptj8.quantization.original_format`).

    Args:
        source_dir: a causal language model as written by `save_pretrained`: safetensors or
            pytorch_model.bin, in one file or sharded. No pickled code is executed.
        target_dir: the directory to create; an existing one is replaced once the new one is
            complete.
        config: block size, codebook and modules to skip.
        calibration: UTF-8 text for scales per input column (`gptj8.quantization.calibration`). The
            model is then converted twice, because the first copy reads the text.

    Raises:
        UserError: if the source is not a model, is already quantized, is incomplete or does not
            match its config, or if the disk is too small; `target_dir` is not changed.
    """
    source, target = Path(source_dir), Path(target_dir)
    if calibration is None and config.input_scales:
        raise UserError("input_scales = True needs a calibration text")
    if calibration is not None:
        return _convert_calibrated(source, target, config, Path(calibration))
    return _convert(source, target, config)


def _convert_calibrated(
    source: Path, target: Path, config: Blockwise8bitConfig, text: Path
) -> ConversionReport:
    check_model_directory(source)
    if original_format.quantized_modules(ShardedWeights(source).shapes):
        raise UserError(f"calibration = {text}: {source} is in 8 bits already and keeps its codes")
    sequences = read_sequences(source, text)
    plain, calibrated = copy.copy(config), copy.copy(config)
    plain.input_scales, calibrated.input_scales = False, True
    _check_target(target)
    with temporary_sibling(target, ".calibration-") as folder:
        _convert(source, folder / "model", plain)
        sizes = input_sizes(folder / "model", sequences)
        shutil.rmtree(folder / "model")  # before the next copy needs as much space
        return _convert(source, target, calibrated, sizes)


def _convert(
    source: Path,
    target: Path,
    config: Blockwise8bitConfig,
    sizes: Mapping[str, torch.Tensor] | None = None,
) -> ConversionReport:
    check_model_directory(source)
    model_config = read_json(source / "config.json")
    if quantization := model_config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"{source} is already quantized ({method}); convert the original model instead"
        )

    _check_target(target)
    weights = ShardedWeights(source)
    stored = original_format.quantized_modules(weights.shapes)
    if not stored:
        weights.require_floats(source)
    else:
        block_size = original_format.common_block_size(stored, source)
        config = Blockwise8bitConfig(block_size, "dynamic", config.skip_modules, block_size, 32)
    skeleton = build_skeleton(source)
    _require_modules(skeleton, config.skip_modules, source)
    swapped = swap_modules(skeleton, config)
    if not swapped:
        raise UserError(
            f"{source}: nothing to convert, because all modules are skipped or have no 8-bit form"
        )
    _check_remaining_modules(skeleton, config.skip_modules, source)
    _check_use_of_weights(skeleton, source)
    report = ConversionReport(source_bytes=weights.total_bytes)
    report.unproven = _prove(skeleton, config, source)
    rows = names_of_rows(skeleton)
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
                if tensor.dtype == torch.float64:
                    tensor = tensor.float()
                    report.rounded.append(source_name)
                module, prefix = name.removesuffix(".weight"), source_name.removesuffix(".weight")
                if prefix in stored:
                    quantized = original_format.take_over(weights, prefix, config.block_size)
                elif module != name and module in swapped:
                    frozen = skeleton.get_submodule(module)
                    assert isinstance(frozen, Frozen8bitModule)
                    if frozen.input_scales is not None:
                        sums = (sizes or {}).get(module)
                        frozen.input_scales = (
                            torch.ones(tensor.shape[frozen.input_dim])
                            if sums is None  # the text did not reach this module
                            else choose_scales(frozen, tensor, sums, config)
                        )
                    quantized = quantize_for(frozen, tensor, config, source_name)
                    report.add(name, frozen.scaled(tensor), quantized)
                    if frozen.input_scales is not None:
                        writer.add(f"{module}.input_scales", frozen.input_scales.clone())
                else:
                    report.kept.append(name)
                    writer.add(name, tensor.clone(memory_format=torch.contiguous_format))
                    continue
                codes = quantized.codes
                writer.add(name, codes.reshape(-1) if name in rows else codes)
                writer.add(f"{module}.absmax", quantized.absmax)
                writer.add(f"{module}.codebook", quantized.codebook)
                if quantized.levels is not None:
                    writer.add(f"{module}.levels", quantized.levels)
        writer.finish()
        original_format.save_adapters(staging, weights, skeleton, base_model=str(target))
        _write_side_files(source, staging, model_config, config, writer.digests)
        report.converted_bytes = sum(f.stat().st_size for f in staging.glob("*.safetensors"))
    return report


def _check_target(target: Path) -> None:
    """Check before the conversion that the target can be created."""
    if target.is_symlink() and not target.exists():
        raise UserError(
            f"{target} is a link to {target.readlink()}, which does not exist; remove the link"
        )
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{target} cannot be created: {parent} is a file")


def _require_modules(skeleton: PreTrainedModel, skip_modules: list[str], source: Path) -> None:
    """Raise UserError if a name in `skip_modules` matches no module."""
    modules = [name for name, _ in skeleton.named_modules()]
    known = dict.fromkeys(
        name.rpartition(".")[2] for name, m in skeleton.named_modules() if m._parameters
    )
    for skipped in skip_modules:
        if not skipped or not any(is_skipped(name, [skipped]) for name in modules):
            raise UserError(
                f"skip_modules = {skipped!r}: {source} has no such module"
                f"{suggest(skipped, known)}; its modules with weights: {', '.join(known)}"
            )


def _check_remaining_modules(
    skeleton: PreTrainedModel, skip_modules: list[str], source: Path
) -> None:
    """Raise UserError if most weights are in modules that have no 8-bit form."""
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
            f"{source}: {share:.0%} of the weights are in modules of a type that has no 8-bit form "
            f"(only Linear, Conv1D and Embedding do): {', '.join(first)}"
            + (f" and {len(large) - 3} more" if len(large) > 3 else "")
            + "; list them in skip_modules to convert the other modules"
        )


def _check_use_of_weights(skeleton: PreTrainedModel, source: Path) -> None:
    """Raise UserError if the model computes with the codes of a frozen module.

    The forward pass runs without data. A model that needs data for it is checked when it is used.
    """
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            skeleton.eval()(input_ids=ids, use_cache=False)
    except CodesUsedAsWeightsError as error:
        named = (
            name
            for name, module in skeleton.named_modules()
            if isinstance(module, Frozen8bitModule) and _is_same(module.weight, error.codes)
        )
        name = next(named, "an 8-bit module")
        raise UserError(
            f"{source}: {type(skeleton).__name__} computes with the weight of {name} itself, or "
            "with its dtype, which is impossible in 8 bits; list it and others like it in "
            "skip_modules"
        ) from None
    except Exception as error:  # any architecture, with any reason not to run without data
        _logger.debug("%s cannot run without data: %s", type(skeleton).__name__, error)


def _prove(skeleton: PreTrainedModel, config: Blockwise8bitConfig, source: Path) -> str | None:
    """Raise UserError if a small copy computes something else in 8 bits.

    Returns:
        Why there is no such copy, or None.
    """
    try:
        found = difference(skeleton, config)
    except NotProvenError as error:
        return str(error)
    if found is not None:
        raise UserError(
            f"{source}: {type(skeleton).__name__} {found}; list the modules that it uses "
            "differently in skip_modules"
        )
    return None


def _is_same(weight: torch.Tensor, codes: torch.Tensor | None) -> bool:
    return codes is not None and weight.untyped_storage()._cdata == codes.untyped_storage()._cdata


def _estimate_bytes(weights: ShardedWeights, names: dict[str, str], swapped: list[str]) -> int:
    quantized = {f"{name}.weight" for name in swapped}
    # One byte per code plus a margin for absmax, codebooks and headers; four bytes for the rest.
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
    """Return a one-line summary for the terminal."""
    sizes = f"{format_bytes(report.source_bytes)} -> {format_bytes(report.converted_bytes)}"
    error = f"relative RMS error {report.relative_rmse:.3%}" if report.tensors else "codes kept"
    rounded = f", {counted(len(report.rounded), 'float64 tensor')} rounded to float32"
    unproven = f", not proven on a small copy ({report.unproven})" if report.unproven else ""
    rounded = rounded if report.rounded else ""
    return f"{report.parameters:,} parameters, {sizes}, {error}{rounded}{unproven}"
