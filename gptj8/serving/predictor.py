"""A model, its adapter, and how it was taught to be asked.

An export holds the params and the labels it was tuned with, so a row of the user's columns becomes
the very prompt that it would have become in training, and the answer is one of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptj8.dataset.prepared.prompts import EncodedPrompt, PromptEncoder, TextEncoder
from gptj8.model.generation.answers import write_answers
from gptj8.model.loading import load_adapter, load_model, pick_device, pick_dtype
from gptj8.model.scoring.likelihood import score_labels
from gptj8.model.scoring.perplexity import context_length
from gptj8.model.scoring.probabilities import label_probabilities
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import quote, suggest
from gptj8.serving.task import TunedTask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ROWS_AT_ONCE = 16


class Predictor:
    """Answers prompts and rows.

    Args:
        model: in eval mode.
        encoder: its tokenizer.
        task: None for a model that was not tuned: it continues prompts and knows no rows.
        name: for people.

    Attributes:
        context: most tokens of prompt and answer together.
        labels: empty where there is nothing to classify.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        encoder: TextEncoder,
        task: TunedTask | None,
        name: str,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.task = task
        self.name = name
        self.context = context_length(model.config)
        self.labels = task.labels if task else ()
        self._prompts: PromptEncoder | None = None
        self._label_ids: list[list[int]] = []
        if task:
            template, side = task.shape.prompt_template, task.shape.truncation_side
            length = min(task.max_length, self.context)
            self._prompts = PromptEncoder(encoder, template, length, side)
            self._label_ids = [self._prompts.completion_ids(label) for label in task.labels]

    @classmethod
    def load(cls, base: str | Path, export: str | Path | None, dtype: str = "auto") -> Predictor:
        """Load a base model, converted or not, and an export's adapter on it.

        Args:
            base: a model directory.
            export: as the stage `export` writes it; None: the base model alone.
            dtype: as `model.dtype` in params.yaml.
        """
        device = pick_device()
        task = TunedTask.load(export) if export else None
        model = load_model(base, pick_dtype(dtype, device), device)
        adapted = load_adapter(model, export) if export else model
        name = f"{base} with {export}" if export else str(base)
        return cls(adapted, TextEncoder.load(base), task, name)

    def encode_row(
        self, row: Mapping[str, Any], max_new_tokens: int, max_prompt_tokens: int | None = None
    ) -> EncodedPrompt:
        """Return the prompt of a row by the user's columns, cut as in training.

        Args:
            row: its answer may be given as well, and is not looked at.
            max_new_tokens: to keep free for the answer.
            max_prompt_tokens: None: as many as in training.

        Raises:
            ValueError: if the model was not tuned, a column is missing or is none, or there are too
                many tokens.
        """
        if self.task is None or self._prompts is None:
            raise ValueError("this model was not tuned and knows no rows; send a prompt")
        columns = {*self.task.columns, *self.task.shape.columns.values()}
        for name in row:
            if name not in columns:
                raise ValueError(f"{quote(name)} is no column{suggest(name, self.task.columns)}")
        try:
            text = self.task.shape.text_of(row)
        except RecursionError:
            raise ValueError("the row is nested too deeply") from None
        _require_characters(text)
        try:
            encoded = self._prompts.prompt(text, max_new_tokens)
        except UserError as error:
            raise ValueError(f"max_new_tokens = {max_new_tokens} is too many: {error}") from None
        _require_few(len(encoded.ids), max_prompt_tokens)
        return encoded

    def encode_prompt(self, prompt: str, max_prompt_tokens: int | None = None) -> list[int]:
        """Return the ids of a prompt as it is; the names of special tokens in it are plain text.

        Raises:
            ValueError: if it is empty, has half a character or too many tokens.
        """
        _require_characters(prompt)
        ids = [*self.encoder.prefix_ids, *self.encoder.encode(prompt)]
        if not ids:
            raise ValueError("the prompt is empty")
        _require_few(len(ids), max_prompt_tokens)
        return ids

    def encode_for_labels(
        self, row: Mapping[str, Any], max_prompt_tokens: int | None = None
    ) -> EncodedPrompt:
        """Return the prompt of a row that leaves room for any label; see `encode_row`.

        Raises:
            ValueError: if there is nothing to classify, or as by `encode_row`.
        """
        if not self._label_ids:
            raise ValueError("this model was not tuned to classify; ask it to generate")
        return self.encode_row(row, max(map(len, self._label_ids)), max_prompt_tokens)

    def classify(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return each label's probability after each prompt: (prompts, labels) float64.

        The likelihoods of the labels, as evaluation measures them, divided by their sum: the model
        has no other answer.
        """
        scores = score_labels(
            self.model, prompts, self._label_ids, batch_size=_ROWS_AT_ONCE, description=None
        )
        return label_probabilities(scores)

    def complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Return the likeliest continuation of each prompt, without white space around it."""
        return write_answers(
            self.model,
            prompts,
            self.encoder,
            max_new_tokens=max_new_tokens,
            batch_size=_ROWS_AT_ONCE,
            description=None,
        )


class AnswerStream:
    """The text of one answer, as its tokens come.

    Args:
        encoder: reads them.
        of_row: the answer to a row was learned behind a space, which is no part of it.

    Attributes:
        text: all so far.
    """

    def __init__(self, encoder: TextEncoder, of_row: bool) -> None:
        self.text = ""
        self._decode = encoder.decode_stream()
        self._of_row = of_row

    def put(self, token: int) -> str:
        """Return what a token adds: nothing while a character is not complete."""
        piece = self._decode(token)
        if self._of_row and not self.text:
            piece = piece.lstrip()
        self.text += piece
        return piece


def _require_few(tokens: int, most: int | None) -> None:
    if most is not None and tokens > most:
        raise ValueError(f"the prompt has {tokens} tokens, and at most {most} are allowed")


def _require_characters(text: str) -> None:
    # JSON can spell half of a pair of surrogates; a tokenizer calls that a wrong type.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half a character (a lone surrogate)") from None
