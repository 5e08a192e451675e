"""Read conversations in the formats that people have.

A message is an object with `role` and `content` (OpenAI), or `from` and `value` (ShareGPT). A
content is text, or a list of text parts. Tool calls are those of OpenAI, or a message from
`function_call` whose content is the call as JSON. The tools and the system message may also be in
columns of their own.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptj8.dataset.text import INVISIBLE
from gptj8.runtime.messages import quote

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""The roles that messages may have, and the roles that chat templates know."""

_CALL_ROLES = ("function_call", "tool_call")
_READ = frozenset(("role", "from", "content", "value", "weight", "id", "tool_call_id"))

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with normalized roles, and the tools that the assistant may call.

    Attributes:
        messages: each with `role`, `content` (text) and the fields of the source that a chat
            template may read, such as `tool_calls`. The arguments of a call are an object.
        tools: JSON schemas of functions.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()

    @property
    def answers(self) -> list[int]:
        """The numbers of the messages to learn.

        These are the assistant's, except those of weight 0 and those before the first question.
        """
        asked = self.first_question
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("weight", 1) != 0 and number > asked
        ]

    @property
    def first_question(self) -> int:
        """The number of the first message from the user or a tool; that after the last if none."""
        numbered = enumerate(self.messages)
        questions = (n for n, message in numbered if message["role"] in ("user", "tool"))
        return next(questions, len(self.messages))

    @property
    def before_questions(self) -> tuple[Message, ...]:
        """The messages before the first question."""
        return self.messages[: self.first_question]

    def until(self, end: int) -> Conversation:
        """Return the conversation with the first `end` messages."""
        return replace(self, messages=self.messages[:end])

    def without_last(self) -> Conversation:
        """Return the conversation without its last message."""
        return self.until(len(self.messages) - 1)

    def to_json(self) -> str:
        """Return the conversation as JSON, for `from_json`."""
        return json.dumps({"messages": self.messages, "tools": self.tools}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Return the conversation that `to_json` wrote."""
        content = json.loads(text)
        return cls(tuple(content["messages"]), tuple(content["tools"]))

    def unread_fields(self, read: frozenset[str]) -> list[str]:
        """Return the fields with a content that a chat template does not read.

        Args:
            read: the names that the template reads.
        """
        found: dict[str, None] = {}
        for message in self.messages:
            names = (name for name, value in message.items() if value not in (None, "", [], {}))
            found.update(dict.fromkeys(n for n in names if n not in read | _READ))
        if self.tools and "tools" not in read:
            found["tools"] = None
        return list(found)


def read_conversation(messages: Any, tools: Any = None, system: Any = None) -> Conversation:
    """Return a conversation.

    Args:
        messages: a list of messages, or that list as JSON.
        tools: a list of functions, or that list as JSON; None or blank if there are none.
        system: the system message, if it is not among the messages.

    Raises:
        ValueError: with the reason, as a phrase that follows the column's name.
    """
    listed = _as_list(messages)
    if listed is None:
        raise ValueError(_not_a_list(messages))
    read = [_read_message(message, number) for number, message in enumerate(listed, 1)]
    read = [m for m in read if m["content"] or m["role"] != "system"]  # empty system messages
    if system is not None and not isinstance(system, str):
        raise ValueError("has a system message that is not text")
    if system is not None and system.strip(INVISIBLE):
        read = _with_system(read, system)
    return Conversation(tuple(read), tuple(_read_tools(tools)))


def read_trained(messages: Any, tools: Any = None, system: Any = None) -> Conversation:
    """Return a conversation with an answer to learn; see `read_conversation`.

    Raises:
        ValueError: also if there is no answer to a question.
    """
    conversation = read_conversation(messages, tools, system)
    first = conversation.first_question
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise ValueError("has no answer from the assistant")
    if first == len(conversation.messages):
        raise ValueError("has no message from the user")
    if not any(message["role"] == "assistant" for message in conversation.messages[first:]):
        raise ValueError("has no answer after a message from the user")
    if not conversation.answers:
        raise ValueError("has no answer to learn: each has the weight 0; 1 or none is learned")
    return conversation


def dialogue(messages: Sequence[Message]) -> str:
    """Return messages as readable text, for reports and for the search for duplicates."""
    return "\n".join(f"{message['role']}: {content_of(message)}" for message in messages)


def content_of(message: Message) -> str:
    """Return the text of a message, with its tool calls as JSON."""
    calls = (json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ())
    return "\n".join(filter(None, [message["content"], *calls]))


def texts_of(cell: str) -> Iterator[str]:
    """Yield the contents in a cell of messages; the cell itself if it has no messages."""
    listed = _as_list(cell)
    if listed is None:
        yield cell
        return
    for message in listed:
        content = _content(message) if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _as_list(cell: Any) -> list[Any] | None:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    return cell if isinstance(cell, list) else None


def _not_a_list(cell: Any) -> str:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            if isinstance(ast.literal_eval(cell), list):
                return "is a list as Python prints it; write it with json.dumps"
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return "is not a list of messages"


def _read_message(message: Any, number: int) -> dict[str, Any]:
    name = message.get("role") or message.get("from") if isinstance(message, dict) else None
    kind = name.strip().casefold() if isinstance(name, str) else ""
    role = ROLES.get(kind)
    if role is None:
        shown = f" {quote(name)}" if isinstance(name, str) else ""
        raise ValueError(f"message {number} has no valid role{shown} ({', '.join(ROLES)})")
    others = ("role", "from", "content", "value")
    # Parquet has every field in every message, as null where there is none.
    rest = {f: value for f, value in message.items() if f not in others and value is not None}
    calls = _read_calls(rest, number)
    content = _read_content(_content(message), number)
    if kind in _CALL_ROLES and not calls:
        content, calls = _calls_in(content)
    if calls:
        rest["tool_calls"] = calls
    if not content.strip(INVISIBLE) and not calls:
        if role not in ("system", "tool"):
            is_missing = _content(message) is None
            raise ValueError(f"message {number} {'has no text' if is_missing else 'is empty'}")
        content = ""
    _check_weight(rest.get("weight"), number)
    return {"role": role, "content": content, **rest}


def _content(message: Mapping[str, Any]) -> Any:
    content = message.get("content")
    return message.get("value") if content is None else content


def _read_content(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"message {number} has no text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"message {number} has a part of type {kind}; only text is supported")
        if not isinstance(text, str):
            raise ValueError(f"message {number} has a part without text")
        texts.append(text)
    return "\n".join(texts)


def _read_calls(fields: dict[str, Any], number: int) -> list[Any]:
    """Return the tool calls of a message, and remove them from its other fields."""
    calls = fields.pop("tool_calls", None) or []
    if fields.get("function_call"):  # OpenAI's older name
        calls = [fields.pop("function_call")]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"message {number} has tool_calls that are not a list of objects")
    return [_as_call(call) for call in calls]


def _as_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    function = dict(function) if isinstance(function, dict) else dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # chat templates expect an object
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    identity = {"id": call["id"]} if "id" in call and "function" in call else {}
    return {**identity, "type": "function", "function": function}


def _calls_in(content: str) -> tuple[str, list[Any]]:
    """Return the content and the calls of a message that is a call as JSON."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return content, []
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return content, []
    return "", [_as_call(call) for call in calls]


def _check_weight(weight: Any, number: int) -> None:
    if weight not in (None, 0, 1):
        raise ValueError(f"message {number} has the weight {weight!r}; it can be 0 or 1")


def _read_tools(tools: Any) -> list[Any]:
    if tools is None or (isinstance(tools, str) and not tools.strip(INVISIBLE)):
        return []
    listed = _as_list(tools)
    if listed is None or not all(isinstance(tool, dict) for tool in listed):
        raise ValueError("has tools that are not a list of functions")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in listed
    ]


def _with_system(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    first = messages[0] if messages else {"role": "user"}
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first["content"].strip() != system.strip():
        raise ValueError("has a system message that differs from the system column")
    return messages
