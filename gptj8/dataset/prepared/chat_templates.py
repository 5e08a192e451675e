"""Render conversations with chat templates.

A chat template is Jinja source, which transformers renders in the same way (`apply_chat_template`;
the environment here is equal, and does not import torch). It comes from the model or from a file.
Without one, a conversation is written in plain words, by a template that is made from
`data.prompt_template`: one line per message, and the end-of-text token after each answer.

Special tokens that the template writes are marked in the rendered text (see
`gptj8.dataset.prepared.text_encoder`), and their names in the messages are not: they stay plain
text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptj8.dataset.prepared.conversations import Conversation, Message
from gptj8.dataset.prepared.text_encoder import MARK, TextEncoder, without_marks
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line, quote

_SEPARATOR = "\ufdd0"
_USER, _ANSWER = "user's text", "assistant's answer"
_LEAD = 64  # most characters between what asks for an answer and its content
_SHORTEST = 4  # fewest characters of a prompt's end that identify it


class ChatTemplate:
    """A chat template of a model.

    Args:
        source: Jinja source.
        encoder: the model's tokenizer.
        name: where the source comes from, for messages.

    Attributes:
        end_id: the special token that ends an answer.

    Raises:
        UserError: if the source is not a template, renders no simple conversation, or ends no
            answer with a special token of the model.
    """

    def __init__(self, source: str, encoder: TextEncoder, name: str = "chat_template") -> None:
        self.source = source
        self.encoder = encoder
        self.name = name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{name} is not a Jinja template: {one_line(error)}") from None
        self.end_id = self._find_end()

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names of fields and variables that the template reads."""
        tree = _environment().parse(self.source)
        names = {node.attr for node in tree.find_all(nodes.Getattr)}
        texts = (node.value for node in tree.find_all(nodes.Const))
        names |= {text for text in texts if isinstance(text, str)}
        return frozenset(names | meta.find_undeclared_variables(tree))

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, with its special tokens marked.

        Args:
            conversation: the messages and tools.
            add_generation_prompt: end the text with what asks for the assistant's answer.

        Raises:
            ValueError: if the template refuses the conversation, with its reason.
        """
        hidden = [
            {**self._hidden(found), "role": found["role"]}
            for found in (_for_template(m, self.reads) for m in conversation.messages)
        ]
        try:
            text = self._template.render(
                messages=hidden,
                tools=self._hidden(list(conversation.tools)) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.encoder.token_names,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"is refused by {self.name}: {one_line(error)}") from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"cannot be rendered by {self.name}: {one_line(error)}") from None
        # The second form is that of `tojson` with ASCII only.
        return self.encoder.mark_names(text).replace(_SEPARATOR, "").replace("\\ufdd0", "")

    def answered(self, conversation: Conversation) -> tuple[str, tuple[int, int]]:
        """Return the text of a conversation that ends with an answer, and where the answer is.

        The text begins with the prompt of the answer. Where the template writes the messages before
        an answer differently once it is given (Mistral's puts the system message into the last
        message of the user), the text is the prompt followed by the answer.

        Returns:
            The text, and character offsets in it: after the prompt without spaces at its end, and
            after the special token that ends the answer. White space after that token belongs to
            the template.

        Raises:
            ValueError: if the template refuses the conversation, or does not write the answer after
                what asks for it.
        """
        prompt = self.render(conversation.without_last(), add_generation_prompt=True)
        text = self.render(conversation)
        if not text.startswith(prompt):
            text = prompt + text[self._end_of_prompt(conversation, prompt, text) :]
        return text, self._span_of_answer(prompt, text)

    def _end_of_prompt(self, conversation: Conversation, prompt: str, text: str) -> int:
        """Return the place in a text where what asks for the answer ends."""
        *before, answer = conversation.messages
        sample = replace(conversation, messages=(*before, {**answer, "content": _ANSWER}))
        begin = self.render(sample).rfind(_ANSWER)
        places = range(max(0, begin - _LEAD), begin + 1)
        common = {place: _common_suffix(prompt, text[:place]) for place in places}
        best = max(common, key=lambda place: (common[place], place), default=0)
        if begin < 0 or common[best] < min(len(prompt), _SHORTEST):
            raise ValueError(
                f"is not written by {self.name} as an answer to its own prompt, which ends with "
                f"{_visible(prompt)}; set data.chat_template to a template that does"
            )
        return best

    def _span_of_answer(self, prompt: str, text: str) -> tuple[int, int]:
        found = text.rfind(MARK, len(prompt))
        last = found + 2  # a mark has two characters
        ends_turn = found >= 0 and not text[last:].strip()
        return len(prompt.rstrip(" ")), last if ends_turn else len(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.encoder, self.name)

    def _find_end(self) -> int:
        """Return the special token that ends an answer of a simple conversation."""
        asked = Conversation(({"role": "user", "content": _USER},))
        answer = {"role": "assistant", "content": _ANSWER}
        try:
            text, (begin, end) = self.answered(Conversation((*asked.messages, answer)))
            prompts = [self.render(asked, add_generation_prompt=g) for g in (False, True)]
        except ValueError as error:
            raise UserError(f"a question with an answer {error}") from None
        if _ANSWER not in text[begin:end] or _USER not in text[:begin]:
            raise UserError(f"{self.name} does not write the content of the messages")
        lead = text[begin:].partition(_ANSWER)[0].strip()
        if lead and prompts[0] == prompts[1]:
            raise UserError(
                f"{self.name} ignores add_generation_prompt, so the model would learn to write "
                f"{_visible(lead)} before each answer; set data.chat_template to a template that "
                "does not"
            )
        ids = self.encoder.tokenize_marked([text[:end]])[0].ids
        if text[end - 2] != MARK:
            after = text[begin:].partition(_ANSWER)[2].strip() or "nothing"
            raise UserError(
                f"{self.name} writes {quote(after)} after an answer, which is not a special token "
                "of the model, so the model could not learn to stop; use a template of this model"
            )
        return ids[-1]

    def _hidden(self, value: Any) -> Any:
        """Return a value with the names of special tokens in it broken up."""
        if isinstance(value, str):
            return self.encoder.split_names(value, _SEPARATOR)
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._hidden(item) for item in value]
        return value


def plain_template(before: str, after: str, encoder: TextEncoder) -> str:
    """Return the source of the template for models without one.

    Args:
        before, after: the words of `data.prompt_template` around `{messages}`; `after` asks for an
            answer.
        encoder: the model's tokenizer.
    """
    names = encoder.token_names
    bos = f"{{{{ {_literal(names['bos_token'])} }}}}" if encoder.prefix_ids else ""
    ask = after or "\nassistant:"
    space = "" if ask[-1:].isspace() else " "
    lead = f"{{% if not text[:1].isspace() %}}{{{{ {space!r} }}}}{{% endif %}}" if space else ""
    return (
        f"{bos}{{{{ {_literal(before)} }}}}"
        "{% for message in messages %}"
        "{% set found = namespace(text=message.content or '') %}"
        "{% for call in message.tool_calls or () %}"
        "{% set found.text = found.text ~ ('\\n' if found.text) ~ (call.function | tojson) %}"
        "{% endfor %}"
        "{% set text = found.text %}"
        "{% if message.role == 'assistant' %}"
        f"{{{{ {_literal(ask)} }}}}{lead}{{{{ text }}}}{{{{ {_literal(names['eos_token'])} }}}}"
        "{% else %}"
        "{{ '' if loop.first else '\\n' }}{{ message.role }}: {{ text }}"
        "{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_literal(ask)} }}}}{{% endif %}}"
    )


def _for_template(message: Message, reads: frozenset[str]) -> dict[str, Any]:
    """Return a message as templates expect it: most of them do not know `developer`."""
    found = {field: value for field, value in message.items() if field != "weight"}
    if found["role"] == "developer" and "developer" not in reads:
        found["role"] = "system"
    return found


class _Generation(Extension):
    """The block `{% generation %}`, which some templates have around an answer."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _literal(text: str) -> str:
    """Return a string as a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def _common_suffix(left: str, right: str) -> int:
    pairs = zip(reversed(left), reversed(right), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _visible(text: str) -> str:
    """Return the end of a rendered text for a message; a special token is shown as a dot."""
    return repr(without_marks(text, "\u00b7")[-30:])


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
