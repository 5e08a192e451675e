"""`gptj8 summary`: print the metrics of the last run."""

from __future__ import annotations

import argparse

from gptj8.tracking.stage_results import measured_by_last_run
from gptj8.tracking.summary import summary_lines


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 summary`."""
    summary = commands.add_parser("summary", help="print the metrics of the last run")
    summary.set_defaults(command=_summary)


def _summary(arguments: argparse.Namespace) -> None:

    measured = {
        f"{s}/{k}": v for s, metrics in measured_by_last_run().items() for k, v in metrics.items()
    }
    print()
    for line in summary_lines(measured):
        print(line)
