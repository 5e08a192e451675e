"""`gptj8 find`: find the MLflow run of an experiment or commit."""

from __future__ import annotations

import argparse

from gptj8.params.sections import load_params


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 find`."""
    find = commands.add_parser("find", help="find the MLflow run of an experiment or commit")
    find.add_argument(
        "what",
        nargs="?",
        metavar="NAME",
        help="DVC experiment, git revision or run id (default: the workspace)",
    )
    find.set_defaults(command=_find)


def _find(arguments: argparse.Namespace) -> None:
    params = load_params()
    from gptj8.tracking.identity import tracking_uri, without_password
    from gptj8.tracking.lookup import find

    uri = without_password(tracking_uri(params))
    for run in find(arguments.what, params):
        tags, metrics = run.data.tags, run.data.metrics
        print(f"{run.info.run_id}  {run.info.run_name}  {run.info.status.lower()}")
        if uri.startswith(("http://", "https://")):
            page = f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/"
            print(f"  {page}{run.info.run_id}")
        for name in ("dvc.experiment", "mlflow.source.git.commit", "command"):
            if name in tags:
                print(f"  {name.removeprefix('mlflow.source.')}: {tags[name]}")
        if "evaluate/tuned/accuracy" in metrics:
            print(f"  accuracy: {metrics['evaluate/tuned/accuracy']:.1%}")
