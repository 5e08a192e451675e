"""Convert rows to token ids; shared by training, evaluation, export and serving.

A prompt is `before + text + after`: the template split at its field. A prompt and its answer are
tokenized as one text. If there are too many tokens, only tokens of the row's text are cut, never
those of the template or the answer, and every caller gets the same ids.

An answer begins where the prompt ends, without the spaces at the prompt's end: many tokenizers join
a space and the word after it in one token. So `Label:` and `Label: ` give the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj8.dataset.prepared.text_encoder import EncodedText, TextEncoder
from gptj8.dataset.prepared.tokenizer_files import read_optional_json
from gptj8.params.templates import split_at_fields
from gptj8.runtime.errors import UserError


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt and the number of text tokens that were cut."""

    ids: list[int]
    cut_tokens: int


@dataclass(frozen=True)
class EncodedExample:
    """A prompt with its completion; only `ids[prompt_length:]` are trained on and scored.

    Attributes:
        cut_tokens: the number of text tokens that were cut.
        room: the number of tokens that are left of the text, or could be added to it; below 1 the
            example is unusable.
        seam: the text of the token that belongs to both prompt and completion; empty if there is
            none. The prompt alone has other tokens at its end.
    """

    ids: list[int]
    prompt_length: int
    cut_tokens: int
    room: int
    seam: str = ""


@dataclass(frozen=True)
class EncodedLabels:
    """The labels of a classification.

    Attributes:
        ids: the token ids of each label after a prompt, including the end-of-text token.
        shared: the number of tokens at the end of a prompt alone that join the label in one token;
            they are not part of `PromptEncoder.prompt` with these labels. Usually 0.
    """

    ids: list[list[int]]
    shared: int

    @property
    def longest(self) -> int:
        """The number of tokens of the longest label."""
        return max(map(len, self.ids), default=0)


class PromptEncoder:
    """Render rows through a template and limit their length.

    Args:
        encoder: the model's tokenizer.
        template: text with one field in braces, for example `"{text}\\n\\nLabel:"`.
        max_length: tokens of prompt and completion together.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        template: str,
        max_length: int,
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        before, *after = split_at_fields(template)[0]
        self.before, self.after = before, "".join(after)

    def labels(self, labels: Sequence[str]) -> EncodedLabels:
        """Return the ids of labels after a prompt.

        The end-of-text token teaches the model to stop. It also distinguishes a label from another
        label that starts with it (`sql`, `sqlalchemy`).
        """
        # The end of the template decides how a label is tokenized.
        prompt = ("x" + self.after).rstrip(" ")
        joined = [join("x" + self.after, label) for label in labels]
        alone, *encoded = self.encoder.encode_batch([prompt, *joined])
        common = min((_common_length(alone, ids) for ids in encoded), default=len(alone))
        eos_id = self.encoder.eos_id
        return EncodedLabels([[*ids[common:], eos_id] for ids in encoded], len(alone) - common)

    def completion_ids(self, completion: str) -> list[int]:
        """Return the ids of a completion after a prompt, with the end-of-text token."""
        return self.labels([completion]).ids[0]

    def prompt(
        self,
        text: str,
        reserve: int,
        examples: Sequence[tuple[str, str]] = (),
        labels: EncodedLabels | None = None,
    ) -> EncodedPrompt:
        """Encode a prompt that leaves room for `reserve` tokens of completion.

        Args:
            text: the row's text.
            reserve: tokens to keep free after the prompt.
            examples: few-shot examples (text, completion) to put before the prompt. All texts share
                the available tokens evenly; tokens that a short text does not need go to longer
                ones.
            labels: the labels to score after the prompt, if any.

        Raises:
            UserError: if the template and the completions leave no room for text in `max_length`.
        """
        texts = [join(self._prompt_text(t), completion) for t, completion in examples]
        parts = [*texts, self._prompt_text(text).rstrip(" ")]
        mark = self.encoder.mark(self.encoder.eos_id)
        encoded = self.encoder.tokenize(parts[:1])
        if parts[1:]:  # every other example follows an end-of-text token
            encoded += self.encoder.tokenize_marked([mark + part for part in parts[1:]])
        lengths = [len(t) for t in (*(t for t, _ in examples), text)]
        insides = [
            self._tokens_of_text(part, length, offset=len(mark) if number else 0)
            for number, (part, length) in enumerate(zip(encoded, lengths, strict=True))
        ]
        prefix = self.encoder.prefix_ids
        sizes = [len(inside) for inside in insides]
        fixed = sum(len(part.ids) for part in encoded) - sum(sizes)
        room = self.max_length - reserve - len(prefix) - fixed
        if room < len(examples) + 1:
            shots = f", {len(examples)} examples" if examples else ""
            raise UserError(self._no_room(shots))
        shares = _share_room(sizes, room)
        ids = list(prefix)
        for part, inside, share in zip(encoded, insides, shares, strict=True):
            ids += _cut(part.ids, inside, len(inside) - share)
        shared = labels.shared if labels else 0
        return EncodedPrompt(ids[: len(ids) - shared], sizes[-1] - shares[-1])

    def examples(
        self, texts: Sequence[str], completions: Sequence[str]
    ) -> Iterator[EncodedExample]:
        """Encode rows for training: each prompt with its complete completion."""
        prefix, eos_id = self.encoder.prefix_ids, self.encoder.eos_id
        prompts = [self._prompt_text(text) for text in texts]
        joined = [join(p, c) for p, c in zip(prompts, completions, strict=True)]
        encoded = self.encoder.tokenize(joined)
        for text, prompt, whole, found in zip(texts, prompts, joined, encoded, strict=True):
            length = len(prefix) + len(found.ids) + 1
            border = len(prompt.rstrip(" "))
            learned = found.token_at(border)
            before = found.end_of(learned - 1) if learned else 0
            seam = "" if before >= border else whole[before : found.end_of(learned)]
            if length <= self.max_length:
                ids = [*prefix, *found.ids, eos_id]
                room = self.max_length - length + 1
                yield EncodedExample(ids, len(prefix) + learned, 0, room, seam)
                continue
            inside = self._tokens_of_text(found, len(text))
            inside = range(inside.start, min(inside.stop, learned))
            excess = length - self.max_length
            room = len(inside) - excess
            cut = min(excess, len(inside))
            ids = [*prefix, *_cut(found.ids, inside, cut), eos_id]
            yield EncodedExample(ids, len(prefix) + learned - cut, excess, room, seam)

    def example(self, text: str, completion: str) -> EncodedExample:
        """Encode one row; see `examples`.

        Raises:
            UserError: if the template and the completion leave no room for text in `max_length`.
        """
        (example,) = self.examples([text], [completion])
        if example.room < 1:
            raise UserError(self._no_room(""))
        return example

    def _prompt_text(self, text: str) -> str:
        return self.before + text + self.after

    def _tokens_of_text(self, encoded: EncodedText, length: int, offset: int = 0) -> range:
        """Return the tokens that are completely inside the row's text."""
        begin = offset + len(self.before)
        first = encoded.token_at(begin)
        if first and encoded.end_of(first - 1) < begin:  # it also covers the end of `before`
            first += 1
        return range(first, max(first, encoded.token_at(begin + length)))

    def _no_room(self, shots: str) -> str:
        return (
            f"data.max_length = {self.max_length} leaves no room for the text after the prompt "
            f"template{shots} and the completion; raise it"
        )


def join(prompt: str, answer: str) -> str:
    """Return a prompt and its answer as one text.

    A space is put between them where neither the prompt's end nor the answer's beginning is white
    space.
    """
    return prompt + ("" if prompt[-1:].isspace() or answer[:1].isspace() else " ") + answer


def room_for_answer(max_new_tokens: int, max_length: int, longest_label: int = 0) -> int:
    """Return how many of `max_length` tokens are kept free for the answer to a row.

    Evaluation and serving keep the same room, so a row has the same prompt in both.

    Args:
        max_new_tokens: the longest completion that evaluation generates; it gets at most half.
        max_length: tokens of prompt and answer together.
        longest_label: tokens of the longest label; 0 unless the answers are labels.
    """
    return longest_label or max(1, min(max_new_tokens, max_length // 2))


def without_lead(answer: str) -> str:
    """Return a generated answer without the single space that `join` puts before it."""
    return answer[1:] if answer[:1] == " " and not answer[1:2].isspace() else answer


def check_context(model_path: str | Path, max_length: int) -> None:
    """Raise an error if `max_length` exceeds the model's number of positions.

    Raises:
        UserError: with both numbers.
    """
    config = read_optional_json(Path(model_path) / "config.json")
    for key in ("n_positions", "max_position_embeddings"):
        positions = config.get(key)
        if isinstance(positions, int) and max_length > positions:
            raise UserError(
                f"data.max_length = {max_length} exceeds the {positions} positions of "
                f"{model_path} ({key}); lower it"
            )


def _cut(ids: list[int], inside: range, excess: int) -> list[int]:
    """Return ids without the last `excess` ones of the row's text."""
    return [*ids[: inside.stop - excess], *ids[inside.stop :]]


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))


def _share_room(lengths: Sequence[int], room: int) -> list[int]:
    """Divide `room` tokens evenly; tokens that short texts do not need go to longer ones."""
    shares = [0] * len(lengths)
    left = len(lengths)
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        shares[index] = min(lengths[index], max(room, 0) // left)
        room -= shares[index]
        left -= 1
    return shares
