"""`gptj8 compare`: approaches to one task, as DVC experiments and one table."""

from __future__ import annotations

import argparse

from gptj8.tracking.approaches import APPROACHES, compare


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 compare`."""
    parser = commands.add_parser(
        "compare", help="run approaches as DVC experiments and make one table of them"
    )
    parser.add_argument(
        "--approaches",
        default=",".join(APPROACHES),
        metavar="NAMES",
        help="separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a param for all of them, as in dvc exp run",
    )
    parser.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    names = [name.strip() for name in arguments.approaches.split(",") if name.strip()]
    compare(names, arguments.set_param)
