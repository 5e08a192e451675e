"""Turn the files that a stage has written into journal events.

A stage that ran and a stage that DVC restored from its cache are recorded from the same files, so
the resulting MLflow runs are identical.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptj8.runtime.dvc_digests import dvc_digest
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, sha256_file, write_json
from gptj8.runtime.manifest import MANIFEST
from gptj8.runtime.project import ADAPTER, BASE, DATASET, EXPORT, REPORTS, STAGES, state_folder
from gptj8.serving.logged_models import export_digest
from gptj8.tracking.examples import example_answers
from gptj8.tracking.journal import Event, JournalWriter, flatten, metric_values, now

ANCESTORS = {
    "validate": (),
    "convert": (),
    "finetune": ("validate", "convert"),
    "evaluate": ("validate", "convert", "finetune"),
    "export": ("validate", "convert", "finetune", "evaluate"),
    "record": STAGES,
}
"""Stages that produce the inputs of a stage. Other reports may belong to another experiment."""

_CURVES = {"finetune": ("loss.csv", "eval_loss.csv")}
_FOLDERS = {"finetune": ADAPTER, "export": EXPORT}
_LEFT_OUT = "merged"  # gigabytes, which DVC already stores
_TABLE = "predictions.csv"
_MOST_FILES = 20  # of a split, each a dataset in MLflow


def stage_is_recordable(stage: str, root: Path = Path()) -> bool:
    """Whether the stage has written a report."""
    return (root / REPORTS / stage / "metrics.json").is_file()


def stage_events(
    stage: str, journal: JournalWriter, *, replay: bool, step: int = 0, root: Path = Path()
) -> list[Event]:
    """Return the events that record a stage's results; files are copied to the journal.

    Args:
        stage: one of `STAGES`.
        journal: journal to copy the files to.
        replay: record the curves too; not needed for a stage that ran, which recorded them live.
        step: last step of the curves. The final metrics use it because MLflow shows the value of
            the last step, which must be the stage's result and not a point of its curve.
        root: folder that the stage ran in.
    """
    folder = root / REPORTS / stage
    events: list[Event] = []
    if replay:
        points = _curves(stage, folder)
        step = max((point["step"] for point in points), default=step)
        events += points
    metrics = read_json(folder / "metrics.json")
    events.append(_event("metrics", step=step, values=metric_values(stage, metrics)))
    events.append(_artifact(journal, folder, f"reports/{stage}"))
    if stage in _FOLDERS and (root / _FOLDERS[stage]).is_dir():
        output = root / _FOLDERS[stage]
        # The weights are stored once, in `adapter`.
        known = _equal_files(output, root / ADAPTER) if stage == "export" else []
        events.append(_artifact(journal, output, output.name, *known))
        if stage == "finetune":
            events.append(_event("tags", tags={"digest.adapter": dvc_digest(output)}))
    if (folder / "inputs.json").is_file():
        events.append(_datasets(read_json(folder / "inputs.json")))
    if (folder / _TABLE).is_file():
        events.append(_table(journal, folder / _TABLE))
        examples = example_answers(root / DATASET, folder / _TABLE)
        if examples is not None:
            events.append(_kept_table(journal, "examples", *examples))
    if stage == "export" and (root / BASE / MANIFEST).is_file() and (root / EXPORT).is_dir():
        digest = export_digest(root / BASE, root / EXPORT)
        card = journal.keep(root / EXPORT / "README.md")
        events.append(_event("model", digest=digest, card=card))
    return events


def measured_by(stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return stage -> flat name -> value for the metrics in the reports of stages.

    Raises:
        UserError: if a stage has no report.
    """
    return {s: flatten(read_json(REPORTS / s / "metrics.json"), "/") for s in stages}


def measured_by_last_run() -> dict[str, dict[str, float]]:
    """Return the metrics of all stages that have a report; see `measured_by`.

    Raises:
        UserError: if no stage has one.
    """
    measured = measured_by([stage for stage in STAGES if stage_is_recordable(stage)])
    if not measured:
        raise UserError("reports/ contains no metrics yet; run `make repro`")
    return measured


def failure_events(stage: str, journal: JournalWriter) -> list[Event]:
    """Return the events that record the report of a failed stage, which may explain the failure.

    A report from an earlier run cannot be mistaken for it, because DVC removes outputs first.
    """
    folder = REPORTS / stage
    if folder.is_dir() and any(folder.iterdir()):
        return [_artifact(journal, folder, f"reports/{stage}")]
    return []


def remember_that_it_ran(stage: str) -> None:
    """Remember that a stage ran while its experiment had no key and therefore no MLflow run."""
    write_json(_note(stage), dvc_digest(REPORTS / stage / "metrics.json"))


def origin(stage: str, root: Path) -> str:
    """Return how an earlier stage that is not recorded yet got its report: `ran` or `cached`."""
    note, report = _note(stage), root / REPORTS / stage / "metrics.json"
    if note.is_file() and read_json(note) == dvc_digest(report):
        note.unlink(missing_ok=True)
        return "ran"
    return "cached"


def _note(stage: str) -> Path:
    return state_folder() / "ran" / f"{stage}.json"


def _curves(stage: str, folder: Path) -> list[Event]:
    points = []
    for name in _CURVES.get(stage, ()):
        if (folder / name).is_file():
            with open(folder / name, newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    step = int(row.pop("step"))
                    values = {key: float(value) for key, value in row.items() if value}
                    points.append(_event("metrics", step=step, values=metric_values(stage, values)))
    return points


def _datasets(inputs: dict[str, Any]) -> Event:
    """Return the event for the datasets that a stage read and wrote, with DVC's digests.

    Many files of a split are one dataset: their folder, with a digest of their digests.
    """
    read: list[tuple[str, str, str]] = []
    for split, items in itertools.groupby(inputs["files"], key=lambda item: item["split"]):
        files = [(item["path"], item["md5"]) for item in items]
        if len(files) > _MOST_FILES:
            folder = os.path.commonpath([path for path, _ in files])
            listing = json.dumps(files).encode()
            digest = hashlib.md5(listing, usedforsecurity=False).hexdigest()
            files = [(folder, digest)]
        read += [(split, path, digest) for path, digest in files]
    made = [("prepared", str(DATASET), inputs["prepared"])]
    return _event(
        "datasets",
        datasets=[
            {"context": context, "name": Path(path).name, "path": path, "digest": digest}
            for context, path, digest in read + made
        ],
    )


def _table(journal: JournalWriter, file: Path) -> Event:
    """Return the event for the predictions as an MLflow table, which its page can compare."""
    with open(file, newline="", encoding="utf-8") as stream:
        columns, *rows = csv.reader(stream)
    return _kept_table(journal, file.stem, columns, rows)


def _kept_table(
    journal: JournalWriter, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> Event:
    """Return the event for a table in the format of `mlflow.log_table`.

    That function appends to a table which a run has already. The file is replaced instead.
    """
    table = journal.folder / f"{name}.json"
    table.write_text(json.dumps({"columns": columns, "data": rows}), encoding="utf-8")
    kept = journal.keep(table)
    table.unlink()
    return _event("artifact", file=kept, folder=None, table=True)


def _artifact(journal: JournalWriter, path: Path, folder: str, *left_out: str) -> Event:
    return _event("artifact", file=journal.keep(path, _LEFT_OUT, *left_out), folder=folder)


def _equal_files(folder: Path, other: Path) -> list[str]:
    """Return the names of files with weights that have the same content in both folders."""
    return [
        file.name
        for file in folder.glob("*.safetensors")
        if (other / file.name).is_file() and sha256_file(other / file.name) == sha256_file(file)
    ]


def _event(event: str, **content: Any) -> Event:
    return {"event": event, "time": now(), **content}
