"""A model with its adapter and prompt format.

An export contains the params and labels of its training. A row with the user's columns therefore
becomes the same prompt as in training, and a classification returns one of the labels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptj8.dataset.prepared.chat_templates import ChatTemplate
from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.conversations import Conversation, read_conversation
from gptj8.dataset.prepared.prompts import (
    EncodedLabels,
    EncodedPrompt,
    PromptEncoder,
    room_for_answer,
    without_lead,
)
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.model.generation.answers import Answer, write_answers
from gptj8.model.generation.batch import Sampling
from gptj8.model.loading import load_adapter, load_model, pick_device, pick_dtype
from gptj8.model.scoring.likelihood import score_labels
from gptj8.model.scoring.perplexity import context_length
from gptj8.model.scoring.probabilities import label_probabilities
from gptj8.params.templates import MESSAGES
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import quote, suggest
from gptj8.serving.mlflow_model import NEW_TOKENS
from gptj8.serving.task import TunedTask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ROWS_AT_ONCE = 16
"""Rows that are answered or classified together."""


class Predictor:
    """Answer prompts and rows.

    Args:
        model: model in eval mode.
        encoder: the model's tokenizer.
        task: task of the adapter; None for a base model, which can only continue prompts.
        name: display name.

    Attributes:
        context: maximum number of tokens of prompt and answer together.
        labels: labels of a classification; empty for other tasks.
        end_ids: tokens that end an answer.
        answer_tokens: tokens that a row's prompt leaves free for its answer, as in evaluation; also
            the default number of new tokens.
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
        self.end_ids = encoder.end_ids
        self._prompts: PromptEncoder | None = None
        self._conversations: ConversationEncoder | None = None
        self._chat = _chat_encoder(task, encoder)
        self._labels = EncodedLabels([], 0)
        self.answer_tokens = NEW_TOKENS
        if task:
            length = min(task.max_length, self.context)
            self._prompts = PromptEncoder(encoder, task.shape.prompt_template, length)
            if task.shape.is_conversation:
                self._conversations = task.conversation_encoder(encoder, length)
                self.end_ids = self._conversations.end_ids
            if task.labels:
                self._labels = self._prompts.labels(task.labels)
            self.answer_tokens = room_for_answer(task.max_new_tokens, length, self._labels.longest)

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._chat is not None

    @classmethod
    def load(cls, base: str | Path, export: str | Path | None, dtype: str = "auto") -> Predictor:
        """Load a base model, converted or not, and optionally the adapter of an export.

        Args:
            base: model directory.
            export: directory written by the stage `export`; None to load only the base model.
            dtype: value as for `model.dtype` in params.yaml.
        """
        device = pick_device()
        task = TunedTask.load(export) if export else None
        model = load_model(base, pick_dtype(dtype, device), device)
        adapted = load_adapter(model, export) if export else model
        name = f"{base} with {export}" if export else str(base)
        return cls(adapted, TextEncoder.load(base), task, name)

    def encode_row(
        self,
        row: Mapping[str, Any],
        max_new_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
    ) -> EncodedPrompt:
        """Return the prompt of a row with the user's columns, as evaluation writes and cuts it.

        Args:
            row: column -> value; a value for the answer is ignored.
            max_new_tokens: number of new tokens, which changes only whether the row is refused;
                None for `answer_tokens`.
            max_prompt_tokens: maximum prompt length; None for the limit of training.

        Raises:
            ValueError: if the model is not fine-tuned, a column is missing or unknown, or there are
                too many tokens.
        """
        if self.task is None or self._prompts is None:
            raise ValueError("this model is not fine-tuned and cannot answer rows; send a prompt")
        columns = self.task.read_columns
        for name in row:
            if name not in columns:
                raise ValueError(f"{quote(name)} is not a column{suggest(name, self.task.columns)}")
        try:
            encoded = self._encode_row(self.task, self._prompts, row)
        except RecursionError:
            raise ValueError("the row is nested too deeply") from None
        except UserError as error:
            raise ValueError(str(error)) from None
        # An empty prompt is replaced by the end-of-text token, as in evaluation.
        encoded = EncodedPrompt(encoded.ids or [self.encoder.eos_id], encoded.cut_tokens)
        _require_at_most(len(encoded.ids), max_prompt_tokens)
        self.require_room(len(encoded.ids), max_new_tokens or self.answer_tokens)
        return encoded

    def require_room(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise an error unless a prompt and its answer fit into the model's context.

        Raises:
            ValueError: with the numbers.
        """
        room = self.context - max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens} leaves no room for a prompt: the model has "
                f"{self.context} positions"
            )
        if prompt_tokens > room:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens, and with max_new_tokens = "
                f"{max_new_tokens} there is room for {room}"
            )

    def _encode_row(
        self, task: TunedTask, prompts: PromptEncoder, row: Mapping[str, Any]
    ) -> EncodedPrompt:
        reserve = self.answer_tokens
        if self._conversations is not None:
            conversation = task.shape.conversation_of(row)
            _require_encodable(conversation.to_json())
            try:
                return self._conversation_prompt(self._conversations, conversation, reserve)
            except ValueError as error:
                raise ValueError(f"{task.shape.columns[MESSAGES]} {error}") from None
        text = task.shape.text_of(row)
        _require_encodable(text)
        return prompts.prompt(text, reserve, labels=self._labels)

    def _conversation_prompt(
        self, encoder: ConversationEncoder, conversation: Conversation, reserve: int
    ) -> EncodedPrompt:
        """Return the prompt of a conversation, like `ConversationEncoder.prompt_to_answer`.

        Where there is no room for it, that is the end of the prompt of training, which is known
        without the answer only if nothing of it was cut.
        """
        try:
            return encoder.prompt(conversation, reserve)
        except ValueError:
            whole = encoder.prompt(conversation, 0)
            if whole.cut_tokens:
                raise
        ids = whole.ids[-(encoder.max_length - reserve) :]
        return EncodedPrompt(ids, len(whole.ids) - len(ids))

    def encode_prompt(self, prompt: str, max_prompt_tokens: int | None = None) -> list[int]:
        """Return the token ids of an unmodified prompt; names of special tokens are plain text.

        Raises:
            ValueError: if the prompt is empty, has a lone surrogate or too many tokens.
        """
        _require_encodable(prompt)
        ids = [*self.encoder.prefix_ids, *self.encoder.encode(prompt)]
        if not ids:
            raise ValueError("the prompt is empty")
        _require_at_most(len(ids), max_prompt_tokens)
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], int]:
        """Return the prompt of a conversation and the token that ends its answer.

        It is written by the template that the model was tuned with, or else by the model's own.
        Nothing is cut.

        Args:
            messages: each with `role` and `content`.

        Raises:
            ValueError: if there is no template, or it refuses the messages.
        """
        if self._chat is None:
            raise ValueError("this model has no chat template; send a prompt to /v1/completions")
        conversation = read_conversation(list(messages))
        if not conversation.messages:
            raise ValueError("has no messages")
        _require_encodable(conversation.to_json())
        return self._chat.prompt(conversation, 0).ids, self._chat.template.end_id

    def encode_for_labels(
        self, row: Mapping[str, Any], max_prompt_tokens: int | None = None
    ) -> EncodedPrompt:
        """Return the prompt of a row with room for every label; see `encode_row`.

        Raises:
            ValueError: if the model has no labels, or for the reasons of `encode_row`.
        """
        if not self.labels:
            raise ValueError("this model is not fine-tuned to classify; use generate instead")
        return self.encode_row(row, None, max_prompt_tokens)

    def classify(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the probability of each label after each prompt: (prompts, labels) float64.

        These are the label likelihoods, computed as in the evaluation and divided by their sum,
        because one of the labels must be chosen.
        """
        scores = score_labels(
            self.model, prompts, self._labels.ids, batch_size=ROWS_AT_ONCE, description=None
        )
        return label_probabilities(scores)

    def complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Return the greedy continuation of each prompt, without the space before an answer."""
        return [a.text for a in self.answer(prompts, [Sampling(max_new_tokens)] * len(prompts))]

    def answer(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> list[Answer]:
        """Return an answer to each prompt with its confidence."""
        return write_answers(
            self.model,
            prompts,
            self.encoder,
            samplings=samplings,
            batch_size=ROWS_AT_ONCE,
            description=None,
            end_ids=self.end_ids,
        )


class AnswerStream:
    """Decode one answer token by token.

    Args:
        encoder: tokenizer of the answer.
        prompt: ids of the prompt.
        of_row: remove the space that precedes the answer to a row in training.

    Attributes:
        text: text decoded so far.
    """

    def __init__(self, encoder: TextEncoder, prompt: Sequence[int], of_row: bool) -> None:
        self.text = ""
        self._decode = encoder.decode_stream(after=prompt)
        self._held: str | None = "" if of_row else None

    def put(self, token: int) -> str:
        """Return the text that a token adds; empty while a character is incomplete."""
        piece = self._decode(token)
        if self._held is not None:
            self._held += piece
            if self._held in ("", " "):  # the next character decides
                return ""
            piece, self._held = without_lead(self._held), None
        self.text += piece
        return piece


def _chat_encoder(task: TunedTask | None, encoder: TextEncoder) -> ConversationEncoder | None:
    """Return an encoder that cuts nothing, with the tuned or the model's own chat template."""
    if task is not None and task.shape.is_conversation:
        return task.conversation_encoder(encoder, sys.maxsize)
    if encoder.chat_template is None:
        return None
    try:
        template = ChatTemplate(encoder.chat_template, encoder)
    except UserError as error:  # the model answers prompts and rows without it
        print(f"warning: no /v1/chat/completions: {error}", file=sys.stderr)
        return None
    return ConversationEncoder(template, sys.maxsize)


def _require_at_most(tokens: int, most: int | None) -> None:
    if most is not None and tokens > most:
        raise ValueError(f"the prompt has {tokens} tokens; at most {most} are allowed")


def _require_encodable(text: str) -> None:
    # JSON can contain a lone surrogate, for which a tokenizer raises a misleading type error.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text contains a lone surrogate, which is not valid Unicode") from None
