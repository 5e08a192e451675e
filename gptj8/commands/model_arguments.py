"""The model arguments that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.runtime.errors import UserError
from gptj8.runtime.project import BASE, EXPORT

if TYPE_CHECKING:
    from gptj8.serving.predictor import Predictor

_BASE, _EXPORT = str(BASE), str(EXPORT)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--adapter` and `--dtype`."""
    parser.add_argument("--model", default=_BASE, help=f"base model (default: {_BASE})")
    parser.add_argument(
        "--adapter", default=_EXPORT, help=f"exported adapter, or none (default: {_EXPORT})"
    )
    parser.add_argument(
        "--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)"
    )


def load_predictor(arguments: argparse.Namespace) -> Predictor:
    """Load the model that the arguments of `add_model_arguments` select.

    Raises:
        UserError: if an argument is invalid.
    """
    export = None if arguments.adapter == "none" else arguments.adapter
    for path, option in ((arguments.model, "--model"), (export, "--adapter")):
        if path is not None and not Path(path).is_dir():
            raise UserError(f"{option} {path} does not exist; run `make repro` or choose another")
    if arguments.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {arguments.dtype} is not auto, bfloat16, float16 or float32")
    from transformers.utils.logging import disable_progress_bar

    from gptj8.serving.predictor import Predictor

    disable_progress_bar()
    return Predictor.load(arguments.model, export, arguments.dtype)
