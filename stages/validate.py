"""Check the dataset, split it and write what is good: artifacts/dataset and reports/validate.

Reads the files that `data` in params.yaml names and the tokenizer of `model.path`. A dataset that
cannot be used ends here, before any model is loaded and without a row in MLflow.
"""

from __future__ import annotations

from pathlib import Path

from gptj8.dataset import SPLITS, save_prepared
from gptj8.dataset_report import write_report
from gptj8.errors import UserError
from gptj8.params import load_params
from gptj8.prompts import TextEncoder, check_context
from gptj8.runtime import run
from gptj8.tracking import REPORTS, stage_run
from gptj8.validation import validate

STAGE = "validate"
DATASET = Path("artifacts/dataset")


def main() -> None:
    """Run the stage in the current folder."""
    params = load_params()
    if not Path(params.model.path).is_dir():
        raise UserError(f"model.path: {params.model.path} is not a directory with a model")
    encoder = TextEncoder.load(params.model.path)
    check_context(params.model.path, params.data.max_length)
    validated = validate(params.data, encoder)
    with stage_run(STAGE, params):
        save_prepared(DATASET, validated.task, validated.splits, validated.rejected)
        report = REPORTS / STAGE
        numbers = write_report(report, validated, params.data.max_length)
    sizes = ", ".join(f"{numbers[f'{name}_rows']:,} {name}" for name in SPLITS)
    left_out = len(validated.rejected[["file", "row"]].drop_duplicates())
    print(f"{numbers['rows']:,} rows read: {sizes}; {left_out:,} left out ({report}/report.md)")


if __name__ == "__main__":
    run(main)
