"""`gptj8 sync`: send pending records to MLflow."""

from __future__ import annotations

import argparse
import sys

from gptj8.params.sections import Params, load_params
from gptj8.runtime.errors import UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 sync`."""
    sync = commands.add_parser(
        "sync", help="send pending records to MLflow and complete this workspace's run"
    )
    sync.set_defaults(command=_sync)


def _sync(arguments: argparse.Namespace) -> None:
    params = load_params()
    from gptj8.tracking.journal import journals_folder, journals_of
    from gptj8.tracking.sending import send_all

    sent = send_all()
    for notice in sent.notices:
        print(f"warning: {notice}", file=sys.stderr)
    if sent.failed:
        left = sum(len(journals_of(folder)) for folder in journals_folder().glob("*"))
        raise UserError(
            f"{'; '.join(sent.failed.values())}; stages not sent: {left} (kept in "
            f"{journals_folder()}); rerun gptj8 sync later to send them"
        )
    print(f"stages sent: {sent.stages}" if sent.stages else "nothing to send")
    if sent.busy:
        print(f"stages still being recorded: {sent.busy}")
    if _is_up_to_date():
        missing = _missing_stages(params)
        if missing:
            from gptj8.tracking.stage import stage_run

            with stage_run("record", params):
                pass
            print(f"this workspace's MLflow run was completed: {', '.join(missing)}")


def _missing_stages(params: Params) -> list[str]:
    from gptj8.runtime.project import STAGES
    from gptj8.tracking.lookup import row_of_workspace
    from gptj8.tracking.rows import missing_stages
    from gptj8.tracking.stage_results import stage_is_recordable

    there = [stage for stage in STAGES if stage_is_recordable(stage)]
    is_known, run = row_of_workspace(params)
    return missing_stages(run.data.tags if run else {}, there) if is_known else []


def _is_up_to_date() -> bool:
    """Return whether the reports match the current params.yaml, and not those of another run."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from gptj8.runtime.project import STAGES

    try:
        with Repo() as repo:
            changed = repo.status()
    except DvcException:
        return False
    return not set(STAGES) & set(changed)  # ignore recipes that no param uses
