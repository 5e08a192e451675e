"""Convert conversations to token ids; shared by training, evaluation, export and serving.

The learned tokens are found by rendering: the text of the messages before an answer, with what asks
for it, and the text of the messages up to the answer, are prefixes of the conversation's text. What
lies between them is the answer with the token that ends it. Some templates write earlier answers
differently than the last one (Qwen 3's drops their reasoning). There, each answer becomes an
example of its own, which ends with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gptj8.dataset.prepared.chat_templates import ChatTemplate
from gptj8.dataset.prepared.conversations import Conversation
from gptj8.dataset.prepared.prompts import EncodedPrompt, without_lead
from gptj8.dataset.prepared.text_encoder import EncodedText, without_marks
from gptj8.runtime.messages import counted

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
        unanswered: the number of messages after the last answer to learn, which are not used.
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
        texts = [self._answered(used, answer) for answer in answers]
        is_rewritten = any(
            not after[0].startswith(text[: span[1]])
            for (text, span), after in itertools.pairwise(texts)
        )
        encoded = self._apart(texts) if is_rewritten else self._together(texts)
        fitting = [number for number, (ids, _) in enumerate(encoded) if len(ids) <= self.max_length]
        tokens = len(encoded[-1][0])
        if not fitting:
            shortened = self._truncated(used.until(answers[0] + 1), len(answers) - 1, tokens)
            return replace(shortened, unanswered=unanswered)
        last, cut = fitting[-1], ""
        used = used.until(answers[last] + 1)
        if last + 1 < len(answers):
            cut = f"loses its end after answer {last + 1} of {len(answers)}: it has {tokens} tokens"
        elif len(fitting) < len(answers):  # the reasoning of an earlier answer is too long
            lost = counted(len(answers) - len(fitting), "answer")
            cut = f"loses {lost} of {len(answers)}, which with the messages before do not fit"
        if self.learn == "last" or not is_rewritten:
            ids, spans = encoded[last]
            examples = [(ids, spans[-2:] if self.learn == "last" else spans)]
        else:
            examples = [encoded[number] for number in fitting]
        return EncodedConversation(used, examples, tokens, cut, unanswered, is_rewritten)

    def answer_of(self, example: tuple[list[int], list[int]]) -> str:
        """Return the last answer of an example as it would be generated, with its tool calls."""
        ids, spans = example
        return without_lead(self.encoder.decode(ids[slice(*spans[-2:])], after=ids[: spans[-2]]))

    def prompt_to_answer(self, conversation: Conversation, reserve: int) -> list[int]:
        """Return the prompt of the last answer of a conversation that was trained.

        It is the prompt of training if `prompt` finds no room for as many tokens, or its end.
        """
        try:
            return self.prompt(conversation.without_last(), reserve).ids
        except ValueError:
            ids, spans = self.encode(conversation).examples[-1]
            return ids[: spans[-2]][-(self.max_length - reserve) :]

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
        for _ in range(_ATTEMPTS + len(conversation.messages)):
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

    def _answered(self, conversation: Conversation, answer: int) -> tuple[str, tuple[int, int]]:
        """Return the text up to an answer, and where the answer is in it."""
        text, (begin, end) = self.template.answered(conversation.until(answer + 1))
        if not without_marks(text[begin:end]).strip():
            raise ValueError(
                f"message {answer + 1} is empty as {self.template.name} writes it, without its "
                "tool_calls; set data.chat_template to a template that reads them"
            )
        return text, (begin, end)

    def _together(self, texts: Sequence[tuple[str, tuple[int, int]]]) -> list[_Encoded]:
        """Encode the whole text once; return its beginnings that end with an answer."""
        (encoded,) = self.encoder.tokenize_marked([texts[-1][0]])
        spans: list[int] = []
        found = []
        for _, span in texts:
            spans = [*spans, *self._tokens_of(encoded, span)]
            found.append((encoded.ids[: spans[-1]], spans))
        if len(encoded.ids) <= self.max_length:  # with what the template writes at the end
            found[-1] = (encoded.ids, spans)
        return found

    def _apart(self, texts: Sequence[tuple[str, tuple[int, int]]]) -> list[_Encoded]:
        """Encode the text up to each answer."""
        encoded = self.encoder.tokenize_marked([text for text, _ in texts])
        pairs = zip(encoded, texts, strict=True)
        return [(e.ids, self._tokens_of(e, span)) for e, (_, span) in pairs]

    def _tokens_of(self, encoded: EncodedText, span: tuple[int, int]) -> list[int]:
        """Return the tokens of a span of characters."""
        start, end = span
        first = encoded.token_at(start)
        # A special token may include the white space around it.
        if self.encoder.marks_special(encoded.ids[first]):
            begins = encoded.end_of(first - 1) if first else 0
            first += begins < start
        return [first, encoded.token_at(end - 1) + 1]

    def _truncated(self, conversation: Conversation, lost: int, tokens: int) -> EncodedConversation:
        """Truncate the longest message before the first answer until the answer fits.

        Args:
            conversation: the messages up to the first answer.
            lost: the number of answers after it.
            tokens: the number of tokens with these answers.
        """
        answer = len(conversation.messages) - 1
        shortened: Conversation | None = conversation
        whole = 0
        for _ in range(_ATTEMPTS):
            assert shortened is not None
            ((ids, spans),) = self._apart([self._answered(shortened, answer)])
            excess = len(ids) - self.max_length
            whole = whole or len(ids)
            if excess <= 0:
                cut = f"is truncated by {whole - len(ids)} tokens in its longest message"
                cut += f", and loses {counted(lost, 'answer')} after the first" if lost else ""
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
        longest = max(range(before), key=lambda number: len(messages[number]["content"]), default=0)
        content = messages[longest]["content"] if before else ""
        (encoded,) = self.encoder.tokenize([content])
        kept = max(1, len(encoded.ids) - excess)
        if kept >= len(encoded.ids):
            return None
        while kept > 1 and encoded.ends[kept - 1] == encoded.ends[kept]:  # inside a character
            kept -= 1
        messages[longest] = {**messages[longest], "content": content[: encoded.ends[kept - 1]]}
        return replace(conversation, messages=tuple(messages))

    def _prompt_ids(self, conversation: Conversation) -> list[int]:
        text = self.template.render(conversation, add_generation_prompt=True)
        return self.encoder.tokenize_marked([text.rstrip(" ")])[0].ids


_Encoded = tuple[list[int], list[int]]


def _without_oldest(conversation: Conversation) -> Conversation | None:
    """Return a conversation without its first exchange; None if only one is left."""
    messages = conversation.messages
    first = 1 if messages and messages[0]["role"] in ("system", "developer") else 0
    for number in range(first + 1, len(messages)):
        if messages[number]["role"] == "user":
            return replace(conversation, messages=(*messages[:first], *messages[number:]))
    return None
