"""`gptj8 verify`: compare a folder's files with its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 verify`."""
    verify = commands.add_parser("verify", help="compare a folder's files with its manifest")
    verify.add_argument("folder", metavar="DIR", help="a model, dataset, adapter or export")
    verify.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    from gptj8.quantization.model_files import check_model_directory, check_tensors
    from gptj8.runtime.manifest import MANIFEST, verify_manifest

    folder = Path(arguments.folder)
    files = verify_manifest(folder)
    if files is None:
        raise UserError(f"{folder} has no {MANIFEST}; only folders written by gptj8 have one")
    if (folder / "config.json").exists():  # only a model has a config and 8-bit tensors
        check_model_directory(folder)
        check_tensors(folder)
    print(f"{folder}: unchanged, {counted(files, 'file')} checked")
