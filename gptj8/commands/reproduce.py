"""`gptj8 reproduce`: repeat a run from its commit."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 reproduce`."""
    reproduce = commands.add_parser(
        "reproduce", help="repeat a run from its commit and compare the adapter byte for byte"
    )
    reproduce.add_argument("what", metavar="RUN", help="run id, DVC experiment or git revision")
    reproduce.set_defaults(command=_reproduce)


def _reproduce(arguments: argparse.Namespace) -> None:
    params = load_params()
    from gptj8.tracking.lookup import client_of, find
    from gptj8.tracking.reproduction import reproduce

    client, _ = client_of(params)
    run = find(arguments.what, params)[0]
    result = reproduce(run, client)
    if result.differing:
        folder = os.path.relpath(result.folder, Path.cwd())
        raise UserError(
            f"run {run.info.run_id} is not reproduced: these files of the adapter differ: "
            f"{', '.join(result.differing)}; compare the checkout in {folder}"
        )
    print(f"run {run.info.run_id} is reproduced: the adapter is byte-identical")
