"""`gptj8 convert`: convert a model's large weights to 8 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptj8.params.sections import Quantization
from gptj8.runtime.errors import UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 convert`."""
    convert = commands.add_parser("convert", help="convert a model's large weights to 8 bits")
    convert.add_argument(
        "source", metavar="SRC", help="model directory, as written by save_pretrained"
    )
    convert.add_argument("target", metavar="DST", help="directory to create")
    defaults = Quantization()
    convert.add_argument(
        "--block-size",
        type=int,
        default=defaults.block_size,
        help="weights per scale, a power of two from 64 to 4096 (default: %(default)s)",
    )
    convert.add_argument(
        "--codebook",
        default=defaults.codebook,
        help="fitted or dynamic (default: %(default)s)",
    )
    convert.add_argument(
        "--skip", action="append", default=[], metavar="MODULE", help="do not convert this module"
    )
    convert.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    if Path(arguments.target).exists():
        raise UserError(f"{arguments.target} already exists; remove it or choose another name")
    from gptj8.quantization.conversion import convert_checkpoint, summarize
    from gptj8.quantization.quantizer import Blockwise8bitConfig

    config = Blockwise8bitConfig(arguments.block_size, arguments.codebook, arguments.skip)
    print(summarize(convert_checkpoint(arguments.source, arguments.target, config)))
