"""`gptj8 convert`: convert a model's large weights to 8 bits; `gptj8 unpack`: read a GGUF file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptj8.params.sections import Quantization
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import temporary_sibling


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 convert` and `gptj8 unpack`."""
    convert = commands.add_parser("convert", help="convert a model's large weights to 8 bits")
    convert.add_argument(
        "source", metavar="SRC", help="model directory as written by save_pretrained, or GGUF file"
    )
    convert.add_argument("target", metavar="DST", help="directory to create")
    defaults = Quantization()
    convert.add_argument(
        "--block-size",
        type=int,
        default=defaults.block_size,
        help="weights per scale, a power of two from 32 to 4096 (default: %(default)s)",
    )
    convert.add_argument(
        "--embedding-block-size",
        type=int,
        default=defaults.embedding_block_size,
        help="the same for embeddings and the head (default: %(default)s)",
    )
    convert.add_argument(
        "--scale-bits",
        type=int,
        default=defaults.scale_bits,
        help="8, or 32 for exact scales (default: %(default)s)",
    )
    convert.add_argument(
        "--codebook",
        default=defaults.codebook,
        help="fitted or dynamic (default: %(default)s)",
    )
    convert.add_argument(
        "--calibration",
        metavar="TEXT",
        help="text file of the kind that the model is for; its activations make the 8-bit model "
        "more accurate",
    )
    convert.add_argument(
        "--skip", action="append", default=[], metavar="MODULE", help="do not convert this module"
    )
    convert.set_defaults(command=_convert)
    unpack = commands.add_parser("unpack", help="write a GGUF file as a model directory")
    unpack.add_argument("source", metavar="GGUF", help="GGUF file, in one part")
    unpack.add_argument("target", metavar="DST", help="directory to create")
    unpack.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float16",
        help="of the weights; float32 is exact for 8-bit files (default: %(default)s)",
    )
    unpack.set_defaults(command=_unpack)


def _convert(arguments: argparse.Namespace) -> None:
    source, target = Path(arguments.source), Path(arguments.target)
    _require_new(target)
    from gptj8.quantization.conversion import convert_checkpoint, summarize
    from gptj8.quantization.quantizer import Blockwise8bitConfig

    config = Blockwise8bitConfig(
        arguments.block_size,
        arguments.codebook,
        arguments.skip,
        arguments.embedding_block_size,
        arguments.scale_bits,
    )
    with _as_directory(source, target) as directory:
        print(summarize(convert_checkpoint(directory, target, config, arguments.calibration)))


@contextmanager
def _as_directory(source: Path, target: Path) -> Iterator[Path]:
    """Yield a model directory: the source, or a temporary one for a GGUF file."""
    if source.suffix != ".gguf" and not source.is_file():
        yield source
        return
    with temporary_sibling(target, ".gguf-") as folder:
        directory = folder / source.stem
        _unpack_file(source, directory, "float32")
        yield directory


def _unpack(arguments: argparse.Namespace) -> None:
    target = Path(arguments.target)
    _require_new(target)
    _unpack_file(Path(arguments.source), target, arguments.dtype)
    print(f"{arguments.source} unpacked into {target}, {arguments.dtype} weights")


def _unpack_file(source: Path, target: Path, dtype: str) -> None:
    import torch

    from gptj8.quantization.gguf import unpack_gguf

    for note in unpack_gguf(source, target, getattr(torch, dtype)):
        print(f"warning: {note}", file=sys.stderr)


def _require_new(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} already exists; remove it or choose another name")
