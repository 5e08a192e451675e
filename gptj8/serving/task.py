"""The task of an export; can be loaded without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gptj8.dataset.prepared.chat_templates import ChatTemplate, plain_template
from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.dataset import Chat
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.row_shapes import Shape, shape_of
from gptj8.dataset.readers.rows import outermost
from gptj8.params.sections import Data
from gptj8.params.yaml_files import check
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json
from gptj8.serving.mlflow_model import NEW_TOKENS


class _TunedData(Data):
    """The section `data` of any version."""

    model_config = ConfigDict(extra="ignore")


class _TunedEvaluate(BaseModel):
    """The needed part of the section `evaluate`."""

    max_new_tokens: Annotated[int, Field(ge=1)] = NEW_TOKENS


class _Tuned(BaseModel):
    """The needed sections of an export's params.json; the others change between versions."""

    data: _TunedData
    evaluate: _TunedEvaluate = _TunedEvaluate()


class _Dataset(BaseModel):
    """The needed part of an export's dataset.json."""

    labels: tuple[str, ...] = ()
    chat: Chat | None = None


@dataclass(frozen=True)
class TunedTask:
    """The task that an export was fine-tuned for.

    Attributes:
        shape: conversion of the user's columns to a text.
        max_length: maximum number of tokens of prompt and answer together.
        labels: labels of a classification; empty for other tasks.
        chat: how conversations are written; None if the rows are prompts, and in old exports.
        max_new_tokens: the longest completion that was evaluated.
    """

    shape: Shape
    max_length: int
    labels: tuple[str, ...]
    chat: Chat | None = None
    max_new_tokens: int = NEW_TOKENS

    @classmethod
    def load(cls, export: str | Path) -> TunedTask:
        """Read the task from params.json and dataset.json in an export.

        Raises:
            UserError: if a file is missing or invalid, or a classification has no labels.
        """
        params, dataset = Path(export) / "params.json", Path(export) / "dataset.json"
        tuned = check(_Tuned, read_json(params), str(params))
        data, tokens = tuned.data, tuned.evaluate.max_new_tokens
        found = check(_Dataset, read_json(dataset), str(dataset))
        if data.task == "classification" and not found.labels:
            raise UserError(f"{dataset} contains no labels; export the adapter again")
        return cls(shape_of(data), data.max_length, found.labels, found.chat, tokens)

    def conversation_encoder(self, encoder: TextEncoder, max_length: int) -> ConversationEncoder:
        """Return an encoder of the task's conversations."""
        if self.chat is None:  # written before there were chat templates
            template = self.shape.template
            assert template is not None
            source = plain_template(template.before, template.after, encoder)
        else:
            source = self.chat.template
        return ConversationEncoder(ChatTemplate(source, encoder), max_length)

    @property
    def columns(self) -> dict[str, bool]:
        """The user's input columns, each with whether a row must have it."""
        return {
            column: field not in self.shape.optional
            for field, column in self.shape.columns.items()
            if field != self.shape.answer
        }

    @property
    def read_columns(self) -> frozenset[str]:
        """The columns that a row may have, with that of the answer and those that hold others."""
        columns = {*self.columns, *self.shape.columns.values()}
        return frozenset(columns | {outermost(name, ()) for name in columns})
