"""Encode rows that are conversations, and report what of them is not used."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gptj8.dataset.prepared.chat_templates import ChatTemplate, plain_template
from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder, EncodedConversation
from gptj8.dataset.prepared.conversations import dialogue, read_trained
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.row_shapes import Shape
from gptj8.dataset.validation.schemas import FAILURE_COLUMNS
from gptj8.params.sections import Data
from gptj8.params.templates import MESSAGES
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted, one_line

TEMPLATES_FOLDER = "data/chat_templates"
"""Where DVC watches files for `data.chat_template`."""

COLUMNS = ("tokens", "cut_tokens", "input_ids", "learned")


def choose_template(data: Data, shape: Shape, encoder: TextEncoder) -> ChatTemplate:
    """Return the chat template for `data.chat_template`.

    Raises:
        UserError: if the file cannot be read, or the template cannot be used; see `ChatTemplate`.
    """
    file = _file_of(data)
    if _is_own(data, encoder):
        return ChatTemplate(encoder.chat_template or "", encoder, "the model's chat template")
    if file is None:
        assert shape.template is not None
        source = plain_template(shape.template.before, shape.template.after, encoder)
        return ChatTemplate(source, encoder, "data.prompt_template")
    name = f"data.chat_template = {file}"
    try:
        source = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; name a file, or use auto or null") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {one_line(error)}") from None
    return ChatTemplate(source, encoder, name)


def describe_template(data: Data, shape: Shape, encoder: TextEncoder) -> list[str]:
    """Return lines on the chat template in use; none if the rows are not conversations."""
    if not shape.is_conversation or shape.template is None:
        return []
    file, is_own = _file_of(data), _is_own(data, encoder)
    if file is None and not is_own:
        return ["conversations are written in plain words (no chat template)"]
    used = "the model's chat template" if is_own else f"the chat template {file}"
    lines = [f"conversations are written by {used}"]
    if shape.template.before or shape.template.after:
        lines.append("the words around {messages} in data.prompt_template are not used")
    if file is not None and TEMPLATES_FOLDER not in Path(file).as_posix():
        lines.append(f"DVC watches only {TEMPLATES_FOLDER}; after a change of the template use -f")
    return lines


def _is_own(data: Data, encoder: TextEncoder) -> bool:
    """Return whether conversations are written by the model's own chat template."""
    return data.chat_template == "auto" and encoder.chat_template is not None


def _file_of(data: Data) -> str | None:
    """Return the file that `data.chat_template` names, if any."""
    return None if data.chat_template == "auto" else data.chat_template


def encode_conversations(
    rows: pd.DataFrame, encoder: ConversationEncoder
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Encode rows of messages.

    Returns:
        The usable rows with `prompt`, `completion`, `conversation` (JSON), `cut` (what was cut) and
        `COLUMNS`; the failures, with the columns of `schemas.failures`; and the number of rows
        whose earlier answers the template rewrites.
    """
    found: dict[int, tuple[object, ...]] = {}
    failed: list[tuple[object, ...]] = []
    rewritten = 0

    def fail(index: object, check: str, field: str, value: object, reason: str) -> None:
        failed.append((index, check, field, value, reason))

    cells = rows[[MESSAGES, "tools", "system"]].astype(object)
    cells = cells.where(cells.notna(), None)
    for index, (messages, tools, system) in zip(
        rows.index, cells.itertuples(index=False), strict=True
    ):
        try:
            conversation = read_trained(messages, tools, system)
            encoded = encoder.encode(conversation)
        except ValueError as error:
            fail(index, "messages", MESSAGES, messages, str(error))
            continue
        except RecursionError:
            fail(index, "messages", MESSAGES, messages, "is nested too deeply")
            continue
        if not encoded.fits:
            reason = f"has no answer that fits within data.max_length = {encoder.max_length}"
            fail(index, "room", MESSAGES, messages, reason)
            continue
        if unread := conversation.unread_fields(encoder.template.reads):
            reason = f"has fields that {encoder.template.name} does not read: {', '.join(unread)}"
            fail(index, "unread_fields", MESSAGES, messages, reason)
        if encoded.unanswered:
            number = counted(encoded.unanswered, "message")
            reason = f"ends with {number} after the last answer to learn"
            fail(index, "unanswered", MESSAGES, messages, reason)
        if any(m["role"] == "assistant" for m in conversation.before_questions):
            reason = "begins with an answer, which is not learned"
            fail(index, "unanswered", MESSAGES, messages, reason)
        rewritten += encoded.is_rewritten
        found[index] = _row(encoded, encoder)
    names = ["prompt", "completion", "conversation", "cut", *COLUMNS]
    usable = pd.DataFrame.from_dict(found, orient="index", columns=names)
    failures = pd.DataFrame(failed, columns=list(FAILURE_COLUMNS))
    return usable, failures, rewritten


def _row(encoded: EncodedConversation, encoder: ConversationEncoder) -> tuple[object, ...]:
    *before, _ = encoded.conversation.messages
    ids, learned = zip(*encoded.examples, strict=True)
    cut = encoded.tokens - encoded.kept_tokens if encoded.cut else 0
    return (
        dialogue(before),
        encoder.answer_of(encoded.examples[-1]),
        encoded.conversation.to_json(),
        encoded.cut,
        encoded.kept_tokens + cut,
        cut,
        list(ids),
        list(learned),
    )
