"""What an export says of the task it was tuned for; light enough to be asked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gptj8.dataset.readers.row_shapes import Shape, shape_of
from gptj8.params.sections import Data
from gptj8.params.yaml_files import check
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json


class _TunedData(Data):
    """The section `data`, of whichever version."""

    model_config = ConfigDict(extra="ignore")


class _Tuned(BaseModel):
    """Of an export's params.json, the section that is needed: others change between versions."""

    data: _TunedData


class _Dataset(BaseModel):
    """Of an export's dataset.json, what is needed."""

    labels: tuple[str, ...] = ()


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
            UserError: if they are not there, or do not say it.
        """
        params, dataset = Path(export) / "params.json", Path(export) / "dataset.json"
        data = check(_Tuned, read_json(params), str(params)).data
        labels = check(_Dataset, read_json(dataset), str(dataset)).labels
        if data.task == "classification" and not labels:
            raise UserError(f"{dataset} names no labels; export the adapter again")
        return cls(shape_of(data), data.max_length, labels)

    @property
    def columns(self) -> dict[str, bool]:
        """The user's columns that a row is asked with, and whether it must have them."""
        return {
            column: field not in self.shape.optional
            for field, column in self.shape.columns.items()
            if field != self.shape.answer
        }
