"""Kinds of damage to conversations, in both message formats where they may differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.dataset.validation.corruption.damage import Damage, cell, row, text
from tests.dataset.validation.corruption.kinds_cells import (
    CONTROL,
    ENTITY,
    LATIN_1,
    append,
    insert,
    instead,
    too_long,
)
from tests.dataset.validation.corruption.shapes import Dataset, Place
from tests.dataset.validation.corruption.texts import SPECIAL

Message = tuple[Any, str]

SPELLINGS = {
    "chat": ("messages", "role", "content"),
    "sharegpt": ("conversations", "from", "value"),
}


def messages(
    name: str,
    shape: str,
    formats: str,
    change: Callable[[list[Message]], list[Message]],
    reason: str,
    check: str = "messages",
) -> Damage:
    """Return a kind that changes the messages of each row, given as (role, content)."""
    column, role, content = SPELLINGS[shape]

    def change_row(dataset: Dataset, place: Place) -> None:
        cells = dataset.row(place)
        changed = change([(message[role], message[content]) for message in cells[column]])
        cells[column] = [{role: speaker, content: words} for speaker, words in changed]

    return row(name, shape, formats, change_row, check, column, reason)


def unknown_role(turns: list[Message]) -> list[Message]:
    return [("robot", turns[0][1]), *turns[1:]]


def no_role(turns: list[Message]) -> list[Message]:
    return [(None, turns[0][1]), *turns[1:]]


def blank_answer(turns: list[Message]) -> list[Message]:
    return [*turns[:-1], (turns[-1][0], " \n")]


def no_user(turns: list[Message]) -> list[Message]:
    return [("system", "Be."), turns[-1]]


def no_answer(turns: list[Message]) -> list[Message]:
    return [*turns, ("user", "And?")]


def one_message(turns: list[Message]) -> list[Message]:
    return [turns[-1]]


def no_message(turns: list[Message]) -> list[Message]:
    return []


NO_ROLE = "message 1 has no valid role"
NO_TEXT = "message 1 has no text"
NO_USER = "has no message from the user"
NO_ANSWER = "has no answer from the assistant"
AFTER_ANSWER = "ends with 1 message after the last answer"
NO_LIST = "is not a list of messages"
OBJECT = "is an object, not a list of"

CONVERSATIONS = [
    messages("chat-unknown-role", "chat", "parquet", unknown_role, NO_ROLE),
    messages("sharegpt-unknown-role", "sharegpt", "jsonl", unknown_role, NO_ROLE),
    messages("sharegpt-no-role", "sharegpt", "parquet", no_role, NO_ROLE),
    messages("chat-empty-content", "chat", "parquet", blank_answer, "is empty"),
    messages("sharegpt-empty-content", "sharegpt", "parquet", blank_answer, "is empty"),
    messages("chat-no-user", "chat", "parquet", no_user, NO_USER),
    messages("sharegpt-no-user", "sharegpt", "jsonl", no_user, NO_USER),
    messages("chat-ends-with-user", "chat", "parquet", no_answer, AFTER_ANSWER, "unanswered"),
    messages(
        "sharegpt-ends-with-user", "sharegpt", "parquet", no_answer, AFTER_ANSWER, "unanswered"
    ),
    messages("chat-one-message", "chat", "parquet", one_message, NO_USER),
    messages("sharegpt-no-message", "sharegpt", "parquet", no_message, NO_ANSWER),
    text("chat-null-content", "chat", "jsonl", instead(None), "messages", NO_TEXT),
    text("sharegpt-null-content", "sharegpt", "parquet", instead(None), "messages", NO_TEXT),
    text("chat-number-content", "chat", "jsonl", instead(5), "messages", NO_TEXT),
    cell("chat-text-messages", "chat", "jsonl", "messages", ["a", "b"], "messages", NO_ROLE),
    cell("chat-not-a-list", "chat", "jsonl", "messages", "user: a", "messages", NO_LIST),
    cell("chat-a-message", "chat", "jsonl", "messages", {"role": "user"}, "type", OBJECT),
    cell("chat-null", "chat", "parquet", "messages", None, "missing"),
    text("chat-nul", "chat", "jsonl", insert("a\0", 0), "nul"),
    text("sharegpt-nul", "sharegpt", "jsonl", insert("a\0", 0), "nul"),
    text("chat-replacement", "chat", "parquet", insert("a\ufffd", 0), "replacement"),
    text("chat-latin-1-bytes", "chat", "jsonl", append(f" {LATIN_1}"), "undecodable"),
    text("chat-control", "chat", "parquet", insert("a\x07", 0), "control", CONTROL + r"'\x07'"),
    text("chat-html", "chat", "parquet", insert("&lt;", 0), "html", ENTITY + "&lt;"),
    text("chat-mojibake", "chat", "jsonl", insert("cafÃ© ", 0), "mojibake"),
    text("chat-special-token", "chat", "parquet", insert(SPECIAL, 0), "special_token"),
    too_long("chat-truncated", "chat", "jsonl"),
    too_long("sharegpt-truncated", "sharegpt", "parquet"),
]
