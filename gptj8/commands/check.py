"""`gptj8 check`: check params.yaml and its input files before a run."""

from __future__ import annotations

import argparse

from gptj8.dataset.inputs import check_inputs
from gptj8.params.sections import load_params


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 check`."""
    check = commands.add_parser("check", help="check params.yaml and its inputs before a run")
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> None:
    check_inputs(load_params())
