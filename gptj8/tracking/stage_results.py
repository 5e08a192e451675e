"""What a stage leaves in its folders, as events of a journal.

Of a stage that ran, and of one that DVC took from its cache without starting a process: both read
the same files, and so both give the same row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptj8.runtime.dvc_digests import dvc_digest
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, write_json
from gptj8.runtime.project import ADAPTER, DATASET, EXPORT, REPORTS, STAGES, state_folder
from gptj8.tracking.journal import Event, JournalWriter, flatten, metric_values, now

ANCESTORS = {
    "validate": (),
    "convert": (),
    "finetune": ("validate", "convert"),
    "evaluate": ("validate", "convert", "finetune"),
    "export": ("validate", "convert", "finetune", "evaluate"),
    "record": STAGES,
}
"""What a stage's inputs were made by: other reports that lie there may be another experiment's."""

_CURVES = {"finetune": ("loss.csv", "eval_loss.csv")}
_FOLDERS = {"finetune": ADAPTER, "export": EXPORT}
_LEFT_OUT = "merged"  # gigabytes, which DVC keeps
_TABLE = "predictions.csv"


def stage_is_recordable(stage: str, root: Path = Path()) -> bool:
    """Whether the stage has left a report."""
    return (root / REPORTS / stage / "metrics.json").is_file()


def stage_events(
    stage: str, journal: JournalWriter, *, replay: bool, step: int = 0, root: Path = Path()
) -> list[Event]:
    """Return the events that put a stage's results into its row; files are copied to the journal.

    Args:
        stage: one of `STAGES`.
        journal: where to copy to.
        replay: whether the curves are to be recorded too; a stage that ran has done so live.
        step: the last of the curves. MLflow shows the value of the last step, and a stage's result
            must not hide behind its curve.
        root: the folder that the stage ran in.
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
        events.append(_artifact(journal, output, output.name))
        if stage == "finetune":
            events.append(_event("tags", tags={"digest.adapter": dvc_digest(output)}))
    if (folder / "inputs.json").is_file():
        events.append(_datasets(read_json(folder / "inputs.json")))
    if (folder / _TABLE).is_file():
        events.append(_table(journal, folder / _TABLE))
    return events


def measured_by(stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return stage -> flat name -> value of what stages have left in their reports.

    Raises:
        UserError: if one of them has left none.
    """
    return {s: flatten(read_json(REPORTS / s / "metrics.json"), "/") for s in stages}


def measured_by_last_run() -> dict[str, dict[str, float]]:
    """Return the same of all stages that have left a report.

    Raises:
        UserError: if none has.
    """
    measured = measured_by([stage for stage in STAGES if stage_is_recordable(stage)])
    if not measured:
        raise UserError("reports/ holds no metrics yet; run `make repro`")
    return measured


def failure_events(stage: str, journal: JournalWriter) -> list[Event]:
    """Return the events of what a stage that failed has left to say why; DVC removes what it left
    at another time."""
    folder = REPORTS / stage
    if folder.is_dir() and any(folder.iterdir()):
        return [_artifact(journal, folder, f"reports/{stage}")]
    return []


def remember_that_it_ran(stage: str) -> None:
    """Note that a stage made its report now, while its experiment has no key and so no row yet."""
    write_json(_note(stage), dvc_digest(REPORTS / stage / "metrics.json"))


def origin(stage: str, root: Path) -> str:
    """Return `ran` or `cached`, of the report of an earlier stage that has no row yet."""
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
    """Datasets that a stage read and made, by the digests that DVC knows them by."""
    read = [(item["split"], item["path"], item["md5"]) for item in inputs["files"]]
    made = [("prepared", str(DATASET), inputs["prepared"])]
    return _event(
        "datasets",
        datasets=[
            {"context": context, "name": Path(path).name, "path": path, "digest": digest}
            for context, path, digest in read + made
        ],
    )


def _table(journal: JournalWriter, file: Path) -> Event:
    """The predictions as MLflow's own kind of table, which its page shows and compares by run."""
    with open(file, newline="", encoding="utf-8") as stream:
        columns, *rows = csv.reader(stream)
    table = journal.folder / f"{file.stem}.json"
    table.write_text(json.dumps({"columns": columns, "data": rows}), encoding="utf-8")
    kept = journal.keep(table)
    table.unlink()
    return _event("artifact", file=kept, folder=None, table=True)


def _artifact(journal: JournalWriter, path: Path, folder: str) -> Event:
    return _event("artifact", file=journal.keep(path, _LEFT_OUT), folder=folder)


def _event(event: str, **content: Any) -> Event:
    return {"event": event, "time": now(), **content}
