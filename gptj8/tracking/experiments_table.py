"""DVC's table of experiments, reduced from two hundred columns to those that fit a screen."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Sequence

from gptj8.runtime.errors import UserError
from gptj8.runtime.tables import format_table

_METRICS = {
    "tuned/accuracy": "accuracy",
    "quantized/perplexity_ratio": "perplexity ratio",
    "finetune/eval_loss": "eval_loss",
    "finetune/peak_memory_gib": "peak GiB",
    "finetune/tokens_per_second": "tokens/s",
}
"""Metrics to show and their column titles, which are shorter than the metrics' names."""
_PARAM = r"seed|(data|model|quantization|finetune|evaluate|export)\.\w+"
# DVC prefixes a name with its file if the name occurs in several files.
_FILE = re.compile(r"reports/(\w+)/metrics\.json:|params\.yaml:")
_FINETUNE_ONLY = {"eval_loss": "finetune/eval_loss"}


def experiments_table(options: Sequence[str] = ()) -> str:
    """Return a table of the experiments with every param that differs and the main metrics.

    Args:
        options: options of `dvc exp show`, such as --all-commits or --num.

    Raises:
        UserError: if `dvc exp show` fails.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--csv", *options]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if process.returncode != 0:
        reasons = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(f"dvc exp show: {' '.join(reasons) or process.stderr.strip()}")
    rows = [_short(row) for row in csv.DictReader(io.StringIO(process.stdout))]
    known = list(dict.fromkeys(name for row in rows for name in row))
    params = _differing([name for name in known if re.fullmatch(_PARAM, name)], rows)
    columns = ["experiment", *params, *(name for name in _METRICS if name in known)]
    if any(row.get("State", "") not in ("", "Success") for row in rows):
        columns.insert(1, "State")
    titles = [_METRICS.get(name, name) for name in columns]
    cells = [[row.get(name, "") for name in columns] for row in rows]
    align = "".join("r" if name in _METRICS else "l" for name in columns)
    return "\n".join(format_table(cells, titles, align))


def _differing(names: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the names whose values differ. Params that change together are all shown: which of
    them matters is for the reader to say."""
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def _short(row: dict[str, str]) -> dict[str, str]:
    """Return a row with file prefixes removed from names and numbers rounded to four digits."""
    found = {"experiment": row.get("Experiment") or row.get("rev") or ""}
    for name, value in row.items():
        if name in ("Experiment", "rev", "typ", "parent", "Created"):
            continue
        file = _FILE.match(name)
        short = name[file.end() :] if file else _FINETUNE_ONLY.get(name, name)
        if file and file[1] and f"{file[1]}/{short}" in _METRICS:
            short = f"{file[1]}/{short}"
        found.setdefault(short, value if re.fullmatch(_PARAM, short) else _number(value))
    return found


def _number(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text if text != "!" else "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
