"""`gptj8 experiments`: `dvc exp show`, short."""

from __future__ import annotations

import argparse


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 experiments`."""
    experiments = commands.add_parser(
        "experiments",
        help="dvc exp show, with the params that differ and the metrics that matter",
    )
    experiments.add_argument("-A", "--all-commits", action="store_true", help="of all commits")
    experiments.add_argument("-n", "--num", type=int, help="of so many commits (default: the last)")
    experiments.set_defaults(command=_experiments)


def _experiments(arguments: argparse.Namespace) -> None:
    from gptj8.tracking.experiments_table import experiments_table

    options = ["--all-commits"] if arguments.all_commits else []
    if arguments.num is not None:
        options += ["--num", str(arguments.num)]
    print(experiments_table(options))
