"""The `gptj8` command. Imports what a subcommand needs when it is chosen: `--help` is instant."""

from __future__ import annotations

import argparse

from gptj8.commands import (
    check,
    compare,
    convert,
    estimate,
    experiments,
    find,
    gate,
    generate,
    lm_eval,
    reproduce,
    serve,
    summary,
    sync,
    ui,
    verify,
)
from gptj8.runtime.process import run

_SUBCOMMANDS = (
    check,
    convert,
    verify,
    summary,
    gate,
    estimate,
    compare,
    lm_eval,
    generate,
    serve,
    sync,
    find,
    experiments,
    reproduce,
    ui,
)


def main() -> None:
    """Entry point; exits 2 with one line a problem on bad input."""
    arguments = _parser().parse_args()
    run(lambda: arguments.command(arguments), computes=getattr(arguments, "computes", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptj8",
        description="Fine-tune GPT-J-class models whose large weights are frozen in 8 bits.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in _SUBCOMMANDS:
        subcommand.add_to(commands)
    return parser


if __name__ == "__main__":
    main()
