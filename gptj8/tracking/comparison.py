"""Record the table of `gptj8 compare` as an MLflow run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj8.params.sections import Params, resolved
from gptj8.runtime.messages import one_line
from gptj8.tracking.identity import is_recorded, tracking_uri
from gptj8.tracking.journal import now

_NOT_IN_A_NAME = r"[^\w\-. ]"  # includes "/", MLflow's separator


def log_comparison(
    params: Params, rows: Sequence[Mapping[str, Any]], files: Sequence[str | Path]
) -> None:
    """Record the table of `gptj8 compare` as a run; the same comparison updates the same run.

    Args:
        params: params that the approaches have in common.
        rows: rows of `gptj8.tracking.approaches_table.table_rows`; numbers become metrics named
            `<approach>/<column>`.
        files: files of the table, logged as artifacts.
    """
    if not is_recorded(params):
        return
    from mlflow.entities import Metric, RunTag

    from gptj8.tracking.delivery import connect
    from gptj8.tracking.rows import KEY_TAG, find_run

    compared = {row["approach"]: row for row in rows if row["status"] != "evaluated"}
    content = json.dumps({"comparison": sorted(compared), "params": resolved(params)})
    key = hashlib.sha256(content.encode()).hexdigest()
    tags = {"gptj8.kind": "comparison", KEY_TAG: key}
    metrics = [
        Metric(f"{re.sub(_NOT_IN_A_NAME, '_', row['approach'])}/{column}", float(value), now(), 0)
        for row in rows
        for column, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    # Name the experiment of each approach, so that its run can be found.
    results = [RunTag(f"approach.{n}", r["experiment"] or r["status"]) for n, r in compared.items()]
    try:
        uri = tracking_uri(params)
        client, group, _ = connect(uri, params.tracking.experiment)
        run = find_run(client, group, key) or client.create_run(group, None, tags, "approaches")
        client.log_batch(run.info.run_id, metrics=metrics, tags=results)
        for file in files:
            client.log_artifact(run.info.run_id, str(file), "approaches")
        failed = any(row["status"] == "failed" for row in rows)
        client.set_terminated(run.info.run_id, "FAILED" if failed else "FINISHED")
    except Exception as error:  # the table is already written; tracking must not fail the command
        print(f"warning: MLflow did not record the table: {one_line(error)}", file=sys.stderr)
