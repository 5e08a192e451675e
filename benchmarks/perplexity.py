"""Measure what storage formats cost a model: `python -m benchmarks.perplexity [MODEL] [--dither]`.

Every format stores the model's linear layers and embeddings. Three texts, taken from the installed
packages, are scored with the restored weights in float32 and compared with the original model:

- KL divergence from the original's next-token distribution to the stored model's. It is never
  negative and ranks formats in the same order on every text.
- the fraction of tokens for which both models have the same first choice.
- the ratio of perplexities, which can be below 1 by chance.

Intervals are 95 % intervals of a paired bootstrap over sequences of up to 512 tokens. `--dither` is
for models that were unpacked from a GGUF file: blocks of 32 weights would meet the file's own
levels again and look too good, so uniform noise within each level's cell is added first.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.metadata
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptj8 import Blockwise8bitConfig, dequantize_blockwise, quantize_blockwise
from gptj8.quantization.calibration import TOKENS, choose_scales, sums_of_squares
from gptj8.quantization.model_files import check_model_directory
from gptj8.quantization.quantizer import quantize_for
from gptj8.quantization.twins import frozen_twin
from gptj8.runtime.errors import UserError
from gptj8.runtime.process import run
from gptj8.runtime.progress import progress
from gptj8.runtime.tables import format_table

LENGTH = 512
SHORTEST = 64
RESAMPLES = 2000
Restore = Callable[[torch.Tensor, bool], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="data/models/smollm2-135m/model")
    parser.add_argument(
        "--formats", default=",".join([*FORMATS, "calibrated"]), help="default: %(default)s"
    )
    parser.add_argument("--dither", action="store_true", help="for weights from a GGUF file")
    parser.add_argument(
        "--tokens", type=int, default=12_000, help="per text (default: %(default)s)"
    )
    arguments = parser.parse_args()
    names = arguments.formats.split(",")
    known = {*FORMATS, "calibrated"}
    if unknown := [name for name in names if name not in known and not _parsed(name)]:
        raise UserError(
            f"--formats: {unknown[0]} is not one of {', '.join(sorted(known))} or BLOCK/BLOCK"
        )
    check_model_directory(arguments.model)
    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if arguments.dither:
        dither(original)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    limit = min(LENGTH, original.config.max_position_embeddings)
    stored = {
        name: calibrated(original, cut(calibration_texts(), tokenizer, limit, TOKENS))
        if name == "calibrated"
        else with_weights(original, FORMATS.get(name) or blockwise(name))
        for name in names
    }
    rows = []
    together: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for text, documents in texts().items():
        sequences = cut(documents, tokenizer, limit, arguments.tokens)
        found = compare(original, stored, sequences, text)
        rows += [(text, name, *described(found[name])) for name in names]
        for name in names:
            together[name].append(found[name])
    rows += [("all", name, *described(np.concatenate(together[name]))) for name in names]
    header = ("text", "format", "KL, 1e-4", "same first choice", "perplexity ratio")
    print("\n".join(format_table([header, *rows], align="llrrr")))


def texts() -> dict[str, list[str]]:
    """Return documents of three kinds from the installed packages, in a fixed random order."""
    licences, descriptions = set(), set()
    for package in importlib.metadata.distributions():
        descriptions.add(str(package.metadata.get_payload()))
        for file in package.files or ():
            if "licen" in file.name.lower() and file.suffix in ("", ".txt", ".md"):
                path = Path(str(file.locate()))
                licences.add(path.read_text(errors="ignore") if path.is_file() else "")
    import pandas

    core = Path(pandas.__file__).parent / "core"
    found = {
        "docstrings": sorted(_docstrings(core, "**/*.py")),
        "licences": sorted(licences),
        "descriptions": sorted(descriptions),
    }
    for documents in found.values():
        random.Random(0).shuffle(documents)
    return found


def calibration_texts() -> list[str]:
    """Return docstrings of the standard library, none of which is in `texts`."""
    found = sorted(_docstrings(Path(ast.__file__).parent, "*.py"))
    random.Random(0).shuffle(found)
    return found


def _docstrings(folder: Path, pattern: str) -> Iterator[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    for file in folder.glob(pattern):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 600:
                yield text


def cut(documents: list[str], tokenizer: Any, length: int, tokens: int) -> list[torch.Tensor]:
    """Return sequences (1, at most `length`) of documents, with `tokens` predictions in total."""
    sequences: list[torch.Tensor] = []
    for document in documents:
        ids = tokenizer(document).input_ids
        for start in range(0, len(ids), length):
            if sum(s.shape[1] - 1 for s in sequences) >= tokens:
                return sequences
            if len(ids) - start >= SHORTEST:
                sequences.append(torch.tensor([ids[start : start + length]]))
    return sequences


def compare(
    original: nn.Module, stored: dict[str, nn.Module], sequences: list[torch.Tensor], text: str
) -> dict[str, np.ndarray]:
    """Return per format (sequences, 4): tokens, sums of KL, of equal choices, of excess loss."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in stored}
    with torch.inference_mode(), progress(len(sequences), text, "sequences") as advance:
        for ids in sequences:
            expected, loss = _log_probabilities(original, ids)
            for name, model in stored.items():
                actual, other = _log_probabilities(model, ids)
                divergence = (expected.exp() * (expected - actual)).sum()
                same = (expected.argmax(1) == actual.argmax(1)).sum()
                row = (len(expected), float(divergence), float(same), float(other - loss))
                found[name].append(row)
            advance(1)
    return {name: np.array(rows) for name, rows in found.items()}


def _log_probabilities(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
    return found, -found.gather(1, ids[0, 1:, None]).double().sum()


def described(sums: np.ndarray) -> tuple[str, str, str]:
    """Return KL, agreement and ratio with their intervals as text."""
    generator = np.random.default_rng(0)
    samples = sums[generator.integers(0, len(sums), (RESAMPLES, len(sums)))].sum(1)

    def estimate(column: int, change: Callable[[Any], Any], form: str) -> str:
        value = change(sums[:, column].sum() / sums[:, 0].sum())
        ends = np.quantile(change(samples[:, column] / samples[:, 0]), [0.025, 0.975])
        return f"{value:{form}} ({ends[0]:{form}} to {ends[1]:{form}})"

    return (
        estimate(1, lambda kl: 1e4 * kl, ".2f"),
        estimate(2, lambda share: share, ".2%"),
        estimate(3, np.exp, ".4f"),
    )


def with_weights(model: nn.Module, restore: Restore) -> nn.Module:
    """Return a copy of a model with the weights that a format restores."""
    changed = copy.deepcopy(model)
    head = changed.get_output_embeddings().weight
    done: set[int] = set()
    with torch.no_grad():
        for module in changed.modules():
            if not isinstance(module, nn.Linear | nn.Embedding) or id(module.weight) in done:
                continue
            done.add(id(module.weight))
            is_embedding = isinstance(module, nn.Embedding) or module.weight is head
            module.weight.copy_(restore(module.weight.detach(), is_embedding))
    return changed


def calibrated(model: nn.Module, sequences: list[torch.Tensor]) -> nn.Module:
    """Return a copy with the weights of the default format with scales per input column."""
    config = Blockwise8bitConfig()
    changed = with_weights(model, _restored(config))
    head = model.get_output_embeddings()
    matrices = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    sums = sums_of_squares(model, matrices, sequences)
    with torch.no_grad():
        for name, module in matrices.items():
            size = config.embedding_block_size if module is head else config.block_size
            frozen: Any = frozen_twin(module, size, torch.float32, config.scale_bits)
            frozen.input_scales = choose_scales(frozen, module.weight, sums[name], config)
            frozen.load_quantized(quantize_for(frozen, module.weight, config, name))
            changed.get_submodule(name).weight.copy_(frozen.restore(torch.float32))
    return changed


def dither(model: nn.Module) -> None:
    """Add uniform noise within the cells of Q8_0 (embedding) and Q4_1 (matrices) levels."""
    generator = torch.Generator().manual_seed(7)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                blocks = weight.view(-1, 32)
                if weight is embedding:
                    step = blocks.abs().amax(1, keepdim=True) / 127
                else:
                    step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
                blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step


def _parsed(name: str) -> tuple[int, int] | None:
    sizes = name.split("/")
    if len(sizes) != 2 or not all(size.isdigit() for size in sizes):
        return None
    return int(sizes[0]), int(sizes[1])


def blockwise(name: str) -> Restore:
    """Return our format with other blocks: `32/128` for 32 in embeddings and 128 elsewhere."""
    embedding, rest = _parsed(name) or (0, 0)
    return _restored(Blockwise8bitConfig(rest, embedding_block_size=embedding))


def _restored(config: Blockwise8bitConfig) -> Restore:
    def restore(weight: torch.Tensor, is_embedding: bool) -> torch.Tensor:
        size = config.embedding_block_size if is_embedding else config.block_size
        bits = config.scale_bits
        return dequantize_blockwise(
            quantize_blockwise(weight, size, config.codebook, scale_bits=bits)
        )

    return restore


def _int8_rows(weight: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() * scale


def _q8_0(weight: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    blocks = weight.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float().clamp(min=1e-30)
    return ((blocks / scale).round().clamp(-127, 127) * scale).view_as(weight)


def _nf4(weight: torch.Tensor, is_embedding: bool) -> torch.Tensor:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(codes, state).view_as(weight)


FORMATS: dict[str, Restore] = {
    "default": _restored(Blockwise8bitConfig()),
    "fitted-4096": _restored(Blockwise8bitConfig(4096, "fitted", None, 4096, 32)),
    "dynamic-4096": _restored(Blockwise8bitConfig(4096, "dynamic", None, 4096, 32)),
    "int8-row": _int8_rows,
    "Q8_0": _q8_0,
    "NF4": _nf4,
}
"""Name -> what the format restores, given a weight and whether it is an embedding or the head.

`int8-row` is also how LLM.int8 and torchao's int8 store weights.
"""


if __name__ == "__main__":
    run(main)
