"""Scales per input column, from the activations of a model on a little text.

A column of a weight matters as much as the input that it is multiplied by. Before a matrix is
quantized, its columns are multiplied by a power of their inputs' size, and the inputs are divided
by the same numbers when the model runs. Columns with large inputs then have smaller errors. The
exponent, which may be zero, is the one with the smallest error of the outputs. The method is that
of AWQ (Lin et al., 2023, arXiv:2306.00978), which folds the division into the layer before.

The numbers are rounded to powers of two, so that neither the multiplication nor the division rounds
in any dtype. Measured on SmolLM2, this is as good as exact numbers.

Sums of activations differ between machines in the last bits, so a calibrated conversion is not
byte-identical everywhere, unlike one without calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptj8.quantization.codec import dequantize_blockwise, quantize_blockwise
from gptj8.quantization.layers import Frozen8bitEmbedding, Frozen8bitModule
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json
from gptj8.runtime.messages import one_line
from gptj8.runtime.progress import progress

if TYPE_CHECKING:
    from gptj8.quantization.quantizer import Blockwise8bitConfig

TOKENS = 4096
"""Tokens of the text that are used, from its start; more change little."""
LENGTH = 512
SHORTEST = 128
# The keys of config.json that limit the length of a text. Some models need two positions more.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
EXPONENTS = (0.0, 0.25, 0.5, 0.75)
_PART = 1 << 22  # weights from which the exponent is chosen
_SMALLEST = 2.0**-10  # columns with smaller inputs than this share of the largest are treated alike


def input_sizes(folder: Path, sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sums of the squared inputs of each frozen matrix.

    Args:
        folder: an 8-bit model.
        sequences: from `read_sequences`.

    Returns:
        float64 (in,) by module name. A tied matrix appears under the names of both modules.

    Raises:
        UserError: if the model cannot read the sequences.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Frozen8bitModule) and not isinstance(module, Frozen8bitEmbedding)
    }
    sums = sums_of_squares(model, matrices, sequences)
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        tied, origin = (name.removesuffix(".weight") for name in pair)
        if tied in sums:
            sums[origin] = sums[tied]
    return sums


def read_sequences(folder: Path, text: Path) -> list[torch.Tensor]:
    """Return the first `TOKENS` tokens of a text as sequences (1, at most `LENGTH`).

    Args:
        folder: a model with its tokenizer.
        text: UTF-8 text, of the kind that the model is for.

    Raises:
        UserError: if the text or the tokenizer cannot be read, or the text is too short.
    """
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"calibration = {text} cannot be read: {one_line(error)}") from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(content[: 16 * TOKENS], return_tensors="pt").input_ids[:, :TOKENS]
    except Exception as error:  # tokenizers and transformers raise anything
        raise UserError(
            f"calibration needs the model's tokenizer, which cannot be loaded from {folder}: "
            f"{one_line(error)}"
        ) from error
    if not ids.numel() and content.strip():
        raise UserError(f"calibration needs the model's tokenizer, but {folder} has none")
    if ids.numel() < SHORTEST:
        raise UserError(
            f"calibration = {text} has {ids.numel()} tokens; at least {SHORTEST} are needed"
        )
    config = read_json(folder / "config.json")
    rows = config.get("vocab_size")
    if isinstance(rows, int) and int(ids.max()) >= rows:
        raise UserError(
            f"{folder}: the tokenizer has token {int(ids.max())}, but the model only {rows} tokens"
        )
    known = [config[key] for key in _POSITIONS if isinstance(config.get(key), int)]
    length = max(min([LENGTH, *(size - 2 for size in known if size > 2)]), 1)
    return [part for part in ids.long().split(length, 1) if part.shape[1] > 1]


def choose_scales(
    module: Frozen8bitModule, weight: torch.Tensor, sums: torch.Tensor, config: Blockwise8bitConfig
) -> torch.Tensor:
    """Return the input scales, float32 (in,), with the smallest squared error of the outputs.

    The error is that of inputs whose columns are uncorrelated, on a part of a large matrix.

    Args:
        module: the frozen module that the weight is for.
        weight: in full precision.
        sums: float64 (in,), sums of squared inputs.
    """
    part = _part(weight, module.input_dim).float()
    best, lowest = torch.ones(len(sums)), math.inf
    for exponent in EXPONENTS:
        scales = scales_for(sums, exponent)
        along = module.along_columns(scales)
        quantized = quantize_blockwise(
            part / along, module.block_size, config.codebook, scale_bits=config.scale_bits
        )
        difference = dequantize_blockwise(quantized).mul_(along).sub_(part)
        error = float((difference.double().square().sum(1 - module.input_dim) * sums).sum())
        if error < lowest:
            best, lowest = scales, error
    return best


def scales_for(sums: torch.Tensor, exponent: float) -> torch.Tensor:
    """Return powers of two near size ** -exponent, with a geometric mean near 1.

    Args:
        sums: float64 (in,), sums of squared inputs.
    """
    largest = float(sums.max())
    if largest == 0.0:
        return torch.ones(len(sums))
    logarithms = sums.clamp(min=largest * _SMALLEST**2).log2() / 2
    return torch.exp2(((logarithms.mean() - logarithms) * exponent).round()).float()


def _part(weight: torch.Tensor, input_dim: int) -> torch.Tensor:
    """Return every n-th output of a matrix, such that few weights remain."""
    step = max(weight.numel() // _PART, 1)
    return weight[::step] if input_dim == 1 else weight[:, ::step]


def sums_of_squares(
    model: Any, modules: Mapping[str, torch.nn.Module], sequences: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the sums of the squared inputs of modules on token ids (1, tokens), by name."""
    sums: dict[str, torch.Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(0).cpu()

        return hook

    hooks = [each.register_forward_pre_hook(record(name)) for name, each in modules.items()]
    try:
        with torch.inference_mode(), progress(len(sequences), "calibrate", "sequences") as advance:
            for ids in sequences:
                model(input_ids=ids, use_cache=False)
                advance(1)
    except Exception as error:  # any architecture, with any reason not to read a text
        raise UserError(
            f"calibration: {type(model).__name__} cannot read the text: {one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return sums
