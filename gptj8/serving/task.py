"""What an export says of the task it was tuned for; light enough to be asked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptj8.files import read_json
from gptj8.params import parse_params
from gptj8.shapes import Shape, shape_of


@dataclass(frozen=True)
class TunedTask:
    """What an export says of the task it was tuned for.

    Attributes:
        shape: from the user's columns to a text.
        max_length: tokens of prompt and answer together.
        labels: empty unless the task is a classification.
    """

    shape: Shape
    max_length: int
    labels: tuple[str, ...]

    @classmethod
    def load(cls, export: str | Path) -> TunedTask:
        """Read the params and the dataset's description that `export` has put beside an adapter.

        Raises:
            UserError: if they are not there.
        """
        export = Path(export)
        params = parse_params(read_json(export / "params.json"), str(export / "params.json"))
        labels = read_json(export / "dataset.json").get("labels", [])
        return cls(shape_of(params.data), params.data.max_length, tuple(labels))

    @property
    def columns(self) -> dict[str, bool]:
        """The user's columns that a row is asked with, and whether it must have them."""
        return {
            column: field not in self.shape.optional
            for field, column in self.shape.columns.items()
            if field != self.shape.answer
        }
