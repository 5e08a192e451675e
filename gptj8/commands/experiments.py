"""`gptj8 experiments`: print a short `dvc exp show`."""

from __future__ import annotations

import argparse


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 experiments`."""
    experiments = commands.add_parser(
        "experiments",
        help="dvc exp show, with only the params that differ and the main metrics",
    )
    experiments.add_argument("-A", "--all-commits", action="store_true", help="show all commits")
    experiments.add_argument(
        "-n", "--num", type=int, help="show the last NUM commits (default: the last one)"
    )
    experiments.set_defaults(command=_experiments)


def _experiments(arguments: argparse.Namespace) -> None:
    from gptj8.tracking.experiments_table import experiments_table

    options = ["--all-commits"] if arguments.all_commits else []
    if arguments.num is not None:
        options += ["--num", str(arguments.num)]
    print(experiments_table(options))
