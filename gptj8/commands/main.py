"""The `gptj8` command. Each subcommand imports its packages when it runs, so `--help` is fast."""

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
from gptj8.runtime.process import flush_output, run

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
    """Run the command line. Invalid input exits with code 2 and one line per problem."""
    try:
        arguments = _parser().parse_args()
    except SystemExit:  # after --help
        flush_output()
        raise
    run(lambda: arguments.command(arguments), computes=getattr(arguments, "computes", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptj8",
        description="Fine-tune language models with large weights that are frozen in 8 bits.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in _SUBCOMMANDS:
        subcommand.add_to(commands)
    return parser


if __name__ == "__main__":
    main()
