"""Convert conversations to token ids; shared by training, evaluation, export and serving.

The learned tokens are found by rendering: the text of the messages before an answer, with what asks
for it, and the text of the messages up to the answer, are prefixes of the conversation's text. What
lies between them is the answer with the token that ends it. Some templates write earlier answers
differently than the last one (Qwen 3's drops their reasoning). There, each answer becomes an
example of its own, which ends with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gptj8.dataset.prepared.chat_templates import ChatTemplate
from gptj8.dataset.prepared.conversations import Conversation, Message
from gptj8.dataset.prepared.prompts import EncodedPrompt
from gptj8.dataset.prepared.text_encoder import EncodedText

_ATTEMPTS = 8


@dataclass(frozen=True)
class EncodedConversation:
    """The training examples of a conversation.

    Attributes:
        conversation: the messages that were used; the last one is an answer.
        examples: for each example, its ids and the learned spans (start, end, start, end, ...).
        tokens: the number of tokens of the complete conversation.
        cut: what was cut because of `max_length`, as a phrase that follows the column's name;
            empty if nothing was.
        unanswered: the number of messages after the last answer, which are not used.
        is_rewritten: whether the template writes earlier answers differently than the last one.
        fits: whether an answer fits; otherwise there is no example.
    """

    conversation: Conversation
    examples: list[tuple[list[int], list[int]]]
    tokens: int
    cut: str = ""
    unanswered: int = 0
    is_rewritten: bool = False
    fits: bool = True

    @property
    def kept_tokens(self) -> int:
        """The number of tokens of the conversation that are in the examples."""
        return max((len(ids) for ids, _ in self.examples), default=0)


class ConversationEncoder:
    """Render conversations with a chat template and limit their length.

    Args:
        template: the chat template, with the model's tokenizer.
        max_length: tokens of an example, and of a prompt and its answer.
        learn: learn `all` answers, or the `last` one of a conversation.
    """

    def __init__(
        self, template: ChatTemplate, max_length: int, learn: Literal["all", "last"] = "all"
    ) -> None:
        self.template = template
        self.encoder = template.encoder
        self.max_length = max_length
        self.learn = learn
        ends = (template.end_id, *self.encoder.end_ids)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Encode a conversation for training.

        What follows the last answer is not used. A conversation that is too long is cut after its
        last answer that fits. If not even the first one fits, the longest message before it is
        truncated.

        Raises:
            ValueError: if the template refuses the conversation; see `ChatTemplate.render`.
        """
        answers = conversation.answers
        used = conversation.until(answers[-1] + 1)
        unanswered = len(conversation.messages) - len(used.messages)
        texts = [self._up_to(used, answer) for answer in answers]
        is_rewritten = any(
            not after[0].startswith(text[: span[1]])
            for (text, span), after in itertools.pairwise(texts)
        )
        encoded = self._apart(texts) if is_rewritten else self._together(texts)
        fitting = [number for number, (ids, _) in enumerate(encoded) if len(ids) <= self.max_length]
        tokens = len(encoded[-1][0])
        if not fitting:
            shortened = self._truncated(used.until(answers[0] + 1), answers[0], tokens)
            return replace(shortened, unanswered=unanswered)
        last, cut = fitting[-1], ""
        if last + 1 < len(answers):
            used = used.until(answers[last] + 1)
            cut = f"loses its end after answer {last + 1} of {len(answers)}: it has {tokens} tokens"
        if self.learn == "last" or not is_rewritten:
            ids, spans = encoded[last]
            examples = [(ids, spans[-2:] if self.learn == "last" else spans)]
        else:
            examples = [encoded[number] for number in fitting]
        return EncodedConversation(used, examples, tokens, cut, unanswered, is_rewritten)

    def prompt(self, conversation: Conversation, reserve: int) -> EncodedPrompt:
        """Encode the messages before an answer, with what asks for it.

        If there are too many tokens, the oldest messages after the system message are left out, and
        then the longest message is truncated.

        Args:
            conversation: the messages, without the answer.
            reserve: tokens to keep free for the answer.

        Raises:
            ValueError: if the template refuses the conversation, or there is no room.
        """
        room = self.max_length - reserve
        ids = self._prompt_ids(conversation)
        total = len(ids)
        while len(ids) > room and (shorter := _without_oldest(conversation)) is not None:
            conversation = shorter
            ids = self._prompt_ids(conversation)
        for _ in range(_ATTEMPTS):
            if len(ids) <= room:
                return EncodedPrompt(ids, total - len(ids))
            shortened = self._shortened(conversation, len(conversation.messages), len(ids) - room)
            if shortened is None:
                break
            conversation = shortened
            ids = self._prompt_ids(conversation)
        raise ValueError(
            f"leaves no room for the messages within {self.max_length} tokens, of which {reserve} "
            "are for the answer"
        )

    def _up_to(self, conversation: Conversation, answer: int) -> tuple[str, tuple[int, int]]:
        """Return the text up to an answer, and where the answer is in it."""
        prompt = self.template.render(conversation.until(answer), add_generation_prompt=True)
        text = self.template.render(conversation.until(answer + 1))
        return text, self.template.span_of_answer(prompt, text)

    def _together(self, texts: Sequence[tuple[str, tuple[int, int]]]) -> list[_Encoded]:
        """Encode the whole text once; return its beginnings that end with an answer."""
        (encoded,) = self.encoder.tokenize_marked([texts[-1][0]])
        spans: list[int] = []
        found = []
        for _, span in texts:
            spans = [*spans, *_tokens_of(encoded, span)]
            found.append((encoded.ids[: spans[-1]], spans))
        if len(encoded.ids) <= self.max_length:  # with what the template writes at the end
            found[-1] = (encoded.ids, spans)
        return found

    def _apart(self, texts: Sequence[tuple[str, tuple[int, int]]]) -> list[_Encoded]:
        """Encode the text up to each answer."""
        encoded = self.encoder.tokenize_marked([text for text, _ in texts])
        return [(e.ids, _tokens_of(e, span)) for e, (_, span) in zip(encoded, texts, strict=True)]

    def _truncated(
        self, conversation: Conversation, answer: int, tokens: int
    ) -> EncodedConversation:
        """Truncate the longest message before the first answer until the answer fits."""
        shortened: Conversation | None = conversation
        for _ in range(_ATTEMPTS):
            assert shortened is not None
            ((ids, spans),) = self._apart([self._up_to(shortened, answer)])
            excess = len(ids) - self.max_length
            if excess <= 0:
                cut = f"is truncated by {tokens - len(ids)} tokens in its longest message"
                return EncodedConversation(shortened, [(ids, spans)], tokens, cut)
            shortened = self._shortened(shortened, answer, excess)
            if shortened is None:
                break
        return EncodedConversation(conversation, [], tokens, fits=False)

    def _shortened(
        self, conversation: Conversation, before: int, excess: int
    ) -> Conversation | None:
        """Return the conversation with `excess` tokens less in its longest message, or None."""
        messages = list(conversation.messages)
        known = [number for number in range(before) if messages[number]["role"] != "assistant"]
        if not known:
            return None
        longest = max(known, key=lambda number: len(messages[number]["content"]))
        content = messages[longest]["content"]
        (encoded,) = self.encoder.tokenize([content])
        kept = len(encoded.ids) - excess
        if kept < 1:
            return None
        messages[longest] = {**messages[longest], "content": content[: encoded.ends[kept - 1]]}
        return replace(conversation, messages=tuple(messages))

    def _prompt_ids(self, conversation: Conversation) -> list[int]:
        text = self.template.render(conversation, add_generation_prompt=True)
        return self.encoder.tokenize_marked([text.rstrip(" ")])[0].ids


_Encoded = tuple[list[int], list[int]]


def _tokens_of(encoded: EncodedText, span: tuple[int, int]) -> list[int]:
    return [encoded.token_at(span[0]), encoded.token_at(span[1])]


def _without_oldest(conversation: Conversation) -> Conversation | None:
    """Return a conversation without its first exchange; None if only one is left."""
    messages = conversation.messages
    first = 1 if messages and messages[0]["role"] in ("system", "developer") else 0
    users = [n for n in _numbers_of_users(messages) if n > first]
    if not users:
        return None
    return replace(conversation, messages=(*messages[:first], *messages[users[0] :]))


def _numbers_of_users(messages: Sequence[Message]) -> Iterator[int]:
    return (number for number, message in enumerate(messages) if message["role"] == "user")
