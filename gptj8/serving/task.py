"""The task of an export; can be loaded without importing torch."""

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
    """The section `data` of any version."""

    model_config = ConfigDict(extra="ignore")


class _Tuned(BaseModel):
    """The needed section of an export's params.json; the others change between versions."""

    data: _TunedData


class _Dataset(BaseModel):
    """The needed part of an export's dataset.json."""

    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class TunedTask:
    """The task that an export was fine-tuned for.

    Attributes:
        shape: conversion of the user's columns to a text.
        max_length: maximum number of tokens of prompt and answer together.
        labels: labels of a classification; empty for other tasks.
    """

    shape: Shape
    max_length: int
    labels: tuple[str, ...]

    @classmethod
    def load(cls, export: str | Path) -> TunedTask:
        """Read the task from params.json and dataset.json in an export.

        Raises:
            UserError: if a file is missing or invalid, or a classification has no labels.
        """
        params, dataset = Path(export) / "params.json", Path(export) / "dataset.json"
        data = check(_Tuned, read_json(params), str(params)).data
        labels = check(_Dataset, read_json(dataset), str(dataset)).labels
        if data.task == "classification" and not labels:
            raise UserError(f"{dataset} contains no labels; export the adapter again")
        return cls(shape_of(data), data.max_length, labels)

    @property
    def columns(self) -> dict[str, bool]:
        """The user's input columns, each with whether a row must have it."""
        return {
            column: field not in self.shape.optional
            for field, column in self.shape.columns.items()
            if field != self.shape.answer
        }
