"""The table of `gptj8 compare`: one row per approach and per system that needs no training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj8.evaluation.systems import BASELINE, FEW_SHOT, ORIGINAL, QUANTIZED, TUNED, own_first
from gptj8.runtime.files import replace_file
from gptj8.runtime.messages import one_line
from gptj8.runtime.tables import format_table, write_csv

FOLDER = Path("reports/approaches")

_TITLES = {
    "layernorm": "LayerNorms only",
    "lora-attention": "LoRA on attention",
    "lora-all-linear": "LoRA on all linear layers",
    FEW_SHOT: "few-shot, not trained",
    QUANTIZED: "8-bit base model, not trained",
    ORIGINAL: "base model, not trained",
    BASELINE: "TF-IDF + logistic regression",
}
# Untrained systems of the project, in table order; external predictions follow.
_UNTRAINED = (FEW_SHOT, QUANTIZED, ORIGINAL, BASELINE)
_MEASURES = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "perplexity")
_COLUMNS = (
    "approach",
    "status",
    "experiment",
    *_MEASURES,
    "eval_loss",
    "trainable_parameters",
    "training_peak_memory_gib",
    "training_seconds",
    "evaluation_peak_memory_gib",
    "evaluation_seconds",
)


@dataclass(frozen=True)
class Outcome:
    """The result of one approach."""

    approach: str
    experiment: str
    """DVC's name of the experiment."""
    metrics: Mapping[str, Mapping[str, Any]] | None
    """Flat metrics of the stages finetune and evaluate; None if the experiment failed."""


def table_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row per approach and one row per system that needs no training.

    Values that were not measured are None. `status` is `trained`, `failed` or `evaluated`.
    """
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = dict.fromkeys(_COLUMNS)
        row |= {"approach": outcome.approach, "status": "failed"}
        if outcome.metrics is not None:
            finetune = outcome.metrics.get("finetune", {})
            row |= {"status": "trained", "experiment": outcome.experiment}
            row |= _evaluated(outcome.metrics.get("evaluate", {}), TUNED)
            row |= {
                "eval_loss": finetune.get("eval_loss"),
                "trainable_parameters": finetune.get("trainable_parameters"),
                "training_peak_memory_gib": finetune.get("peak_memory_gib"),
                "training_seconds": finetune.get("seconds"),
            }
        rows.append(row)
    first = next((outcome for outcome in outcomes if outcome.metrics), None)
    if first is None or first.metrics is None:
        return rows
    evaluate = first.metrics.get("evaluate", {})
    measured = [key.rpartition("/") for key in evaluate]
    found = dict.fromkeys(s for s, _, m in measured if s and m in ("accuracy", "perplexity"))
    found.pop(TUNED, None)
    for system in own_first(found, _UNTRAINED):
        row = dict.fromkeys(_COLUMNS)
        row |= {"approach": system, "status": "evaluated", "experiment": first.experiment}
        rows.append(row | _evaluated(evaluate, system))
    return rows


def write_table(rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write approaches.csv and approaches.md atomically, and return their paths."""
    files = [FOLDER / "approaches.csv", FOLDER / "approaches.md"]
    write_csv(files[0], rows, _COLUMNS)
    with replace_file(files[1]) as staging:
        staging.write_text(markdown_table(rows), encoding="utf-8")
    return files


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown, without columns that are empty in every row.

    A task without labels has no accuracy, so perplexity and validation loss are shown instead.
    """
    labels = any(row.get("accuracy") is not None for row in rows)
    columns = [
        ("accuracy (95 % interval)", [_accuracy(row) if labels else "" for row in rows]),
        ("macro-F1", [_form(row, "macro_f1", "{:.3f}") if labels else "" for row in rows]),
        ("perplexity", ["" if labels else _form(row, "perplexity", "{:.3f}") for row in rows]),
        ("validation loss", ["" if labels else _form(row, "eval_loss", "{:.4f}") for row in rows]),
    ]
    columns += [
        (title, [_form(row, key, form) for row in rows])
        for title, key, form in (
            ("trainable parameters", "trainable_parameters", "{:,.0f}"),
            ("training: peak GiB", "training_peak_memory_gib", "{:.2f}"),
            ("training: seconds", "training_seconds", "{:,.1f}"),
            ("evaluation: peak GiB", "evaluation_peak_memory_gib", "{:.2f}"),
            ("evaluation: seconds", "evaluation_seconds", "{:,.1f}"),
        )
    ]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    names = []
    for row in rows:
        name = _TITLES.get(row["approach"], row["approach"])
        names.append(_escape(f"{name}: failed" if row["status"] == "failed" else name))
    columns.insert(0, ("approach", names))
    cells = list(zip(*(column for _, column in columns), strict=True))
    titles = [title for title, _ in columns]
    return "\n".join(format_table(cells, titles, style="pipe")) + "\n"


def _escape(text: str) -> str:
    """Escape a user's name for a table cell: no line breaks, column separators or markup."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", one_line(text))


def _accuracy(row: Mapping[str, Any]) -> str:
    accuracy, low, high = (row.get(k) for k in ("accuracy", "accuracy_low", "accuracy_high"))
    if accuracy is None:
        return ""
    interval = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
    return f"{accuracy:.1%}{interval}"


def _form(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else form.format(value)


def _evaluated(evaluate: Mapping[str, Any], system: str) -> dict[str, Any]:
    return {
        **{measure: evaluate.get(f"{system}/{measure}") for measure in _MEASURES},
        "evaluation_peak_memory_gib": evaluate.get(f"{system}/peak_memory_gib"),
        "evaluation_seconds": evaluate.get(f"{system}/seconds"),
    }
