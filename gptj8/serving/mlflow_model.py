"""The model that `mlflow models serve` and `mlflow.pyfunc.load_model` load, without a pickle.

A registered version contains the export and the 8-bit base model, so it can be loaded anywhere and
does not depend on the project's artifacts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from gptj8.serving.predictor import Predictor

BASE = "base-8bit"
EXPORT = "export"

LIBRARIES = (
    "accelerate",
    "ftfy",
    "jinja2",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "pydantic",
    "regex",
    "rensa",
    "ruamel.yaml",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
)
"""Packages imported by the code that is stored with a registered model."""

NEW_TOKENS = 64
"""Default number of new tokens per completion."""


class Model:
    """Answer the rows of a table through MLflow's interface for Python functions."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, rows: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return an answer for each row.

        Args:
            rows: table with the columns that the model was trained on, except the answer.
            params: `max_new_tokens`, for a model that writes completions.

        Returns:
            for a classification, the column `label` and one column `score_<label>` per label with
            its probability; otherwise the column `completion`.

        Raises:
            UserError: if a row is invalid, with its number, or if `max_new_tokens` is below 1.
        """
        import pandas as pd

        # Missing cells are NaN, which would count as a number instead of a missing value.
        records = rows.astype(object).where(rows.notna(), None).to_dict("records")
        labels = self.predictor.labels
        if not labels:
            tokens = int((params or {}).get("max_new_tokens", self.predictor.answer_tokens))
            if tokens < 1:
                raise UserError(f"max_new_tokens = {tokens} must be at least 1")
            prompts = [
                _of_row(number, lambda row=row: self.predictor.encode_row(row, tokens).ids)
                for number, row in enumerate(records)
            ]
            return pd.DataFrame({"completion": self.predictor.complete(prompts, tokens)})
        prompts = [
            _of_row(number, lambda row=row: self.predictor.encode_for_labels(row).ids)
            for number, row in enumerate(records)
        ]
        scores = self.predictor.classify(prompts)
        found = pd.DataFrame(scores, columns=[f"score_{label}" for label in labels])
        found.insert(0, "label", [labels[index] for index in scores.argmax(1)])
        return found


def _of_row(number: int, encode: Any) -> list[int]:
    try:
        return encode()
    except ValueError as error:
        raise UserError(f"row {number}: {error}") from error


def _load_pyfunc(data_path: str) -> Model:
    """Load the model; MLflow calls this function with the folder of `base-8bit` and `export`."""
    from gptj8.serving.predictor import Predictor

    folder = Path(data_path)
    return Model(Predictor.load(folder / BASE, folder / EXPORT))
