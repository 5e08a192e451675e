"""`gptj8 gate`: check the last run against `evaluate.require`."""

from __future__ import annotations

import argparse

from gptj8.evaluation.gate import check_requirements
from gptj8.params.requirements import parse_requirement
from gptj8.params.sections import load_params
from gptj8.runtime.errors import UserError
from gptj8.tracking.stage_results import measured_by_last_run


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 gate`."""
    gate = commands.add_parser(
        "gate", help="check the conditions in evaluate.require; exit with code 2 if one is not met"
    )
    gate.set_defaults(command=_gate)


def _gate(arguments: argparse.Namespace) -> None:

    require = load_params().evaluate.require
    if not require:
        raise UserError("evaluate.require is empty; add a condition to check")
    outcomes = check_requirements(
        [parse_requirement(text) for text in require], measured_by_last_run()
    )
    for outcome in outcomes:
        print(outcome)
    if not all(outcome.met for outcome in outcomes):
        raise UserError("the last run does not meet evaluate.require")
