"""`gptj8 sync`, `find`, `reproduce` and `experiments`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gptj8.params.sections import Params, load_params
from gptj8.runtime.errors import UserError


def add_tracking_commands(commands: argparse._SubParsersAction) -> None:
    """Add the commands that are about recorded runs."""
    sync = commands.add_parser(
        "sync", help="send MLflow what it has not received, and complete this workspace's row"
    )
    sync.set_defaults(command=_sync)

    find = commands.add_parser("find", help="tell which MLflow run an experiment or commit has")
    find.add_argument(
        "what",
        nargs="?",
        metavar="NAME",
        help="DVC experiment, git revision or run id (default: the workspace)",
    )
    find.set_defaults(command=_find)

    experiments = commands.add_parser(
        "experiments",
        help="dvc exp show, with the params that differ and the metrics that matter",
    )
    experiments.add_argument("-A", "--all-commits", action="store_true", help="of all commits")
    experiments.add_argument("-n", "--num", type=int, help="of so many commits (default: the last)")
    experiments.set_defaults(command=_experiments)

    reproduce = commands.add_parser(
        "reproduce", help="do a run again from its commit and compare the adapter byte for byte"
    )
    reproduce.add_argument("what", metavar="RUN", help="run id, DVC experiment or git revision")
    reproduce.set_defaults(command=_reproduce)


def _sync(arguments: argparse.Namespace) -> None:
    params = load_params()
    from gptj8.tracking.identity import key_of
    from gptj8.tracking.journal import journals_folder, journals_of
    from gptj8.tracking.sending import send_all

    sent = send_all()
    for notice in sent.notices:
        print(f"warning: {notice}", file=sys.stderr)
    if sent.failed:
        left = sum(len(journals_of(folder)) for folder in journals_folder().glob("*"))
        reasons = "; ".join(f"{uri}: {reason}" for uri, reason in sent.failed.items())
        raise UserError(
            f"{reasons}; the record of {left} stages stays in {journals_folder()}, run gptj8 sync "
            "again once the server answers"
        )
    print(
        f"sent: the record of {sent.stages} stages" if sent.stages else "nothing was left to send"
    )
    if sent.busy:
        print(f"{sent.busy} more are being recorded right now")
    if _is_up_to_date():
        missing = _missing_stages(params, key_of(params))
        if missing:
            from gptj8.tracking.stage import stage_run

            with stage_run("record", params):
                pass
            print(f"this workspace's row was completed: {', '.join(missing)}")


def _missing_stages(params: Params, key: str | None) -> list[str]:
    from gptj8.tracking.delivery import connect, find_run, missing_stages
    from gptj8.tracking.evidence import STAGES, stage_is_recordable
    from gptj8.tracking.identity import tracking_uri

    if key is None:
        return []
    uri = tracking_uri(params)
    client, group, _ = connect(uri, params.tracking.experiment)
    run = find_run(client, group, key)
    there = [stage for stage in STAGES if stage_is_recordable(stage)]
    return missing_stages(run.data.tags if run else {}, there)


def _is_up_to_date() -> bool:
    """Whether the reports are those of params.yaml as it is: otherwise they are another run's."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from gptj8.tracking.evidence import STAGES

    try:
        with Repo() as repo:
            changed = repo.status()
    except DvcException:
        return False
    return not set(STAGES) & set(changed)  # recipes that no param points at were never run


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


def _experiments(arguments: argparse.Namespace) -> None:
    from gptj8.tracking.experiments_table import experiments_table

    options = ["--all-commits"] if arguments.all_commits else []
    if arguments.num is not None:
        options += ["--num", str(arguments.num)]
    print(experiments_table(options))


def _reproduce(arguments: argparse.Namespace) -> None:
    params = load_params()
    from gptj8.tracking.lookup import client_of, find
    from gptj8.tracking.reproduction import reproduce

    client, _ = client_of(params)
    run = find(arguments.what, params)[0]
    result = reproduce(run, client)
    if result.differing:
        folder = os.path.relpath(result.folder, Path.cwd())
        raise UserError(
            f"run {run.info.run_id} is not reproduced: {', '.join(result.differing)} of the "
            f"adapter differ (the checkout is kept in {folder})"
        )
    print(f"run {run.info.run_id} is reproduced: the adapter is the same to the byte")
