"""Unpack a GGUF file, llama.cpp's format, into a model directory as `save_pretrained` writes it.

transformers reads the file and restores its quantized weights. It refuses to save such a model, so
the tensors are written here, one at a time.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gptj8.quantization.shards import ShardWriter
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory, require_free_space
from gptj8.runtime.messages import one_line
from gptj8.runtime.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
# Pre-tokenizers (`tokenizer.ggml.pre`) that transformers does not know and replaces by GPT-2's.
# These split off every digit first (llama.cpp, `llama_vocab`).
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_READ_ERRORS = (
    *(ImportError, OSError, ValueError, LookupError, RuntimeError, TypeError),
    *(AttributeError, ArithmeticError, MemoryError, struct.error),
)
_AS_GPT2 = (
    "gpt-2",
    "phi-2",
    "jina-es",
    "jina-de",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "roberta-bpe",
)


def unpack_gguf(
    file: str | Path, target: str | Path, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Write config, weights, tokenizer and chat template of a GGUF file to a directory.

    Args:
        file: a complete GGUF file of an architecture that transformers can read.
        target: the directory to create; an existing one is replaced once the new one is complete.
        dtype: of the weights. Values of 8-bit GGUF files need float32 to be exact.

    Returns:
        Warnings, one line each, about what the file does not determine.

    Raises:
        UserError: if the file is not a complete GGUF file of a known architecture; `target` is not
            changed.
    """
    file, target = Path(file), Path(target)
    _check(file)
    try:
        with _quiet():
            model, tokenizer, metadata = _read(file, dtype)
    except _READ_ERRORS as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    notes = _fix_pre_tokenizer(tokenizer, metadata)
    weights = _own_tensors(model)
    size = sum(tensor.numel() * dtype.itemsize for tensor in weights.values())
    require_free_space(target.parent, size, "the unpacked model")
    with replace_directory(target) as staging, ShardWriter(staging) as writer:
        with progress(size, "unpack", "bytes") as advance:
            for name, tensor in weights.items():
                writer.add(name, tensor.detach().to(dtype).clone())
                advance(tensor.numel() * dtype.itemsize)
        writer.finish()
        _save_config(model, dtype, staging)
        tokenizer.save_pretrained(staging)
    return notes


def _check(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    with open(file, "rb") as stream:
        magic = stream.read(len(_MAGIC))
    if magic != _MAGIC:
        raise UserError(f"{file} is not a GGUF file; it does not start with {_MAGIC.decode()}")
    if (part := _PART.search(file.name)) and int(part[1]) > 1:
        raise UserError(
            f"{file} is one of {int(part[1])} parts; merge them first with llama.cpp's "
            "llama-gguf-split --merge"
        )


def _read(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    header = GgufHeader.from_file(str(file))
    needed = header.data_start + max(t.offset + t.nbytes for t in header.tensors)
    if file.stat().st_size < needed:
        raise ValueError(f"it is truncated: it has {file.stat().st_size:,} of {needed:,} bytes")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, trust_remote_code=False
    )
    return model, tokenizer, read_gguf_metadata(str(file))[0]


def _fix_pre_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> list[str]:
    """Set the pre-tokenizer of byte-level tokenizers where transformers does not know it."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS:
        return []
    if name in _SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif name not in _AS_GPT2:
        return [
            f"the pre-tokenizer {name!r} is not known, and GPT-2's is used; if token ids differ "
            "from the original model's, replace tokenizer.json by the original"
        ]
    return []


def _own_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the state dict, without those that are tied to another one."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _save_config(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    config = model.config
    del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # the file's title, which is no path
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of transformers and, except on a terminal, its progress bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with bars, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
