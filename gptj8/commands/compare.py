"""`gptj8 compare`: run several approaches as DVC experiments and compare them in one table."""

from __future__ import annotations

import argparse

from gptj8.tracking.approaches import APPROACHES, compare


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 compare`."""
    parser = commands.add_parser(
        "compare", help="run several approaches as DVC experiments and print a table"
    )
    parser.add_argument(
        "--approaches",
        default=",".join(APPROACHES),
        metavar="NAMES",
        help="comma-separated (default: %(default)s)",
    )
    parser.add_argument(
        "-S",
        "--set-param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a param in all experiments, as in dvc exp run",
    )
    parser.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    names = [name.strip() for name in arguments.approaches.split(",") if name.strip()]
    compare(names, arguments.set_param)
