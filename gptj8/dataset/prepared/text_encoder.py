"""Tokenize text as the model's own tokenizer does.

The ids of a text are those that the tokenizer gives for the whole text. Parts are never encoded
apart: a tokenizer that marks the beginnings of words (Llama 2, Mistral, T5) would put a stray token
between them, and others would miss tokens that span two parts. The place of a part is found from
the characters that each token covers.

Names of special tokens inside a text, such as `<|endoftext|>`, are encoded as ordinary characters
and never end a document or an answer. A special token is written with `TextEncoder.mark`.

Only the `tokenizers` library is needed, so `validate` does not import torch.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from gptj8.dataset.prepared.tokenizer_files import (
    find_eos_id,
    read_chat_template,
    read_end_ids,
    read_optional_json,
    read_token_names,
    read_tokenizer,
)
from gptj8.runtime.errors import UserError

MARK = "\ufdd1"
"""The first character of a marked special token. It is a noncharacter, which no text contains."""

_FIRST_INDEX = 0x100000  # of a private plane of Unicode
_PIECE = 1 << 16
_OVERLAP = 1 << 9
_CONTEXT = 8  # tokens before decoded ones


@dataclass(frozen=True)
class EncodedText:
    """The ids of a text and the characters that each token covers.

    Attributes:
        ids: token ids.
        ends: for each token, the offset after its last character.
    """

    ids: list[int]
    ends: Sequence[int]

    def token_at(self, character: int) -> int:
        """Return the number of tokens that end at or before a character offset."""
        found = self.ends.token_at(character) if isinstance(self.ends, _Ends) else None
        return bisect_right(self.ends, character) if found is None else found

    def end_of(self, token: int) -> int:
        """Return the offset after the last character of a token."""
        return self.ends.end_of(token) if isinstance(self.ends, _Ends) else self.ends[token]


class TextEncoder:
    """Tokenize text; names of special tokens in a text are ordinary characters.

    Attributes:
        prefix_ids: the tokens that the tokenizer puts before every text, such as Llama's BOS.
        eos_id: the token that ends a completion.
        end_ids: the tokens that end a generated text: `eos_id` and those of generation_config.json.
        vocab_size: all ids are below it; the model may have more embedding rows.
        special_tokens: the special tokens as text.
        token_names: what a chat template calls `bos_token`, `eos_token` and so on.
        chat_template: the model's own chat template (Jinja source), if it has one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_id: int,
        token_names: Mapping[str, str] | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy; the caller's is unchanged
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.prefix_ids = _prefix_ids(tokenizer)
        tokenizer.post_processor = None  # GPT-2's excludes spaces from the offsets of tokens
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.special_tokens = tuple(token.content for _, token in self._special_tokens())
        self.eos_id = eos_id
        self.end_ids = tuple(dict.fromkeys((eos_id, *end_ids)))
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        eos = {"eos_token": tokenizer.id_to_token(eos_id) or ""}
        self.token_names = {**(token_names or {}), **eos}
        if self.prefix_ids:
            bos = tokenizer.id_to_token(self.prefix_ids[0]) or ""
            self.token_names.setdefault("bos_token", bos)
        self.chat_template: str | None = None

    @property
    def eos(self) -> str:
        """The name of the token that ends a completion."""
        return self.token_names["eos_token"]

    @classmethod
    def load(cls, model_path: str | Path) -> TextEncoder:
        """Read the tokenizer of a model directory.

        Raises:
            UserError: if there is no tokenizer or end-of-text token, or if the tokenizer has more
                tokens than the model's embedding has rows.
        """
        model_path = Path(model_path)
        if not model_path.is_dir():
            raise UserError(f"{model_path} does not exist or is not a model directory")
        tokenizer = read_tokenizer(model_path)
        names = read_token_names(model_path)
        eos_id = find_eos_id(model_path, names, tokenizer)
        encoder = cls(tokenizer, eos_id, names, read_end_ids(model_path))
        encoder.chat_template = read_chat_template(model_path)
        rows = read_optional_json(model_path / "config.json").get("vocab_size")
        if isinstance(rows, int) and encoder.vocab_size > rows:
            raise UserError(
                f"{model_path}: the tokenizer has {encoder.vocab_size} tokens, but the model's "
                f"embedding has {rows} rows; use the tokenizer that the model was trained with"
            )
        return encoder

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without prefix or end-of-text token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; the tokenizer uses all cores."""
        if any(len(text) > _PIECE for text in texts):
            return [text.ids for text in self.tokenize(texts)]
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [text.ids for text in found]

    def tokenize(self, texts: Sequence[str]) -> list[EncodedText]:
        """Return the ids of each text with the characters that they cover.

        Memory is limited: a tokenizer needs 100 bytes per character of a word, so a cell of 10 MB
        without a space would take 1 GB. A longer text is encoded in overlapping pieces, which are
        joined where both have a border between tokens.
        """
        return _tokenize(self._tokenizer, texts)

    def mark(self, token_id: int) -> str:
        """Return the characters that stand for a special token in a marked text."""
        return self._marks[token_id]

    def mark_names(self, text: str) -> str:
        """Replace the names of special tokens in a text by their marks."""
        names = self._mark_of_name
        return self._names.sub(lambda found: names[found.group()], text)

    def split_names(self, text: str, separator: str) -> str:
        """Return a text in which a character separates the letters of special tokens' names."""
        if MARK in text or separator in text:
            raise ValueError("contains U+FDD0 or U+FDD1, which are not characters")
        return self._names.sub(lambda found: separator.join(found.group()), text)

    def tokenize_marked(self, texts: Sequence[str]) -> list[EncodedText]:
        """Return the ids of texts with marked special tokens; see `tokenize`."""
        known = self._marked_ids
        return [
            EncodedText([known.get(i, i) for i in text.ids], text.ends)
            for text in _tokenize(self._marked, texts)
        ]

    def marks_special(self, token_id: int) -> bool:
        """Return whether a token is a special token, for which there is a mark."""
        return token_id in self._marks

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling loses `encode_special_tokens`, and the copy has no post-processor.
        arguments = (self._tokenizer, self.eos_id, self.token_names, self.end_ids)
        return _restore, (arguments, self.prefix_ids, self.chat_template)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Return the text of `ids`.

        Args:
            ids: token ids.
            after: the ids before them. Tokenizers that mark the beginnings of words remove a space
                at the beginning of a decoded text.
        """
        before = list(after[-_CONTEXT:])
        text = self._tokenizer.decode([*before, *ids], skip_special_tokens=True)
        return text[len(self._tokenizer.decode(before, skip_special_tokens=True)) :]

    def decode_stream(self, after: Sequence[int] = ()) -> Callable[[int], str]:
        """Return a function that decodes one id per call, after other ids.

        Each call returns the text that the id adds, which is empty while a character is incomplete.
        """
        stream = DecodeStream(ids=list(after[-_CONTEXT:]), skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def token_text(self, token_id: int) -> tuple[str, bool]:
        """Return the text of one token inside a text, and whether it is text.

        Special tokens and parts of characters are not text; they get their name in the vocabulary.
        """
        text = self.decode([token_id], after=self._letter)
        is_text = text != "" and "\ufffd" not in text
        return (text if is_text else self._tokenizer.id_to_token(token_id) or ""), is_text

    @cached_property
    def _letter(self) -> list[int]:
        return self.encode("a")

    def _special_tokens(self) -> Iterator[tuple[int, AddedToken]]:
        added = self._tokenizer.get_added_tokens_decoder()
        return ((number, token) for number, token in sorted(added.items()) if token.special)

    @cached_property
    def _marks(self) -> dict[int, str]:
        # The end token may be missing from the tokenizer's special tokens.
        known = dict.fromkeys([*(number for number, _ in self._special_tokens()), self.eos_id])
        return {number: MARK + chr(_FIRST_INDEX + index) for index, number in enumerate(known)}

    @cached_property
    def _mark_of_name(self) -> dict[str, str]:
        name_of = self._tokenizer.id_to_token
        # A name of one letter cannot be split.
        named = {name_of(number) or "": mark for number, mark in self._marks.items()}
        return {name: mark for name, mark in named.items() if len(name) > 1}

    @cached_property
    def _names(self) -> re.Pattern[str]:
        longest_first = sorted(self._mark_of_name, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _marked(self) -> Tokenizer:
        """A copy of the tokenizer that knows the marks instead of the names."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        added = dict(self._special_tokens())
        for number, mark in self._marks.items():
            like = added.get(number, AddedToken("", normalized=False))
            flags = {name: getattr(like, name) for name in ("single_word", "lstrip", "rstrip")}
            tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False, **flags)])
        return tokenizer

    @cached_property
    def _marked_ids(self) -> dict[int, int]:
        marked = self._marked.get_added_tokens_decoder()
        number_of = {mark: number for number, mark in self._marks.items()}
        return {i: number_of[t.content] for i, t in marked.items() if t.content in number_of}


def without_marks(text: str, instead: str = "") -> str:
    """Return a marked text with another text instead of each special token."""
    return re.sub(f"{MARK}.", instead, text, flags=re.DOTALL)


def _restore(arguments: Any, prefix_ids: list[int], chat_template: str | None) -> TextEncoder:
    encoder = TextEncoder(*arguments)
    encoder.prefix_ids, encoder.chat_template = prefix_ids, chat_template
    return encoder


def _prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids before a text; those after it, as T5's end token, are not part of a prompt."""
    around = tokenizer.encode("a").ids
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    for start in range(len(around) - len(alone) + 1):
        if around[start : start + len(alone)] == alone:
            return around[:start]
    return []


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[EncodedText]:
    short = [text for text in texts if len(text) <= _PIECE]
    found = iter(tokenizer.encode_batch(short, add_special_tokens=False))
    return [
        _as_encoded(next(found)) if len(text) <= _PIECE else _tokenize_long(tokenizer, text)
        for text in texts
    ]


class _Ends(Sequence[int]):
    """The ends of a text's tokens, which are converted to Python objects when they are needed."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    @cached_property
    def _ends(self) -> list[int]:
        return [end for _, end in self._encoding.offsets]

    def token_at(self, character: int) -> int | None:
        """Return the first token that covers a character; None if no token does."""
        return self._encoding.char_to_token(character)

    def end_of(self, token: int) -> int:
        """Return one end without converting the others."""
        found = self._encoding.token_to_chars(token)
        return self._ends[token] if found is None else found[1]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        return self._ends[index]


def _as_encoded(encoding: Encoding) -> EncodedText:
    return EncodedText(encoding.ids, _Ends(encoding))


def _tokenize_long(tokenizer: Tokenizer, text: str) -> EncodedText:
    """Encode overlapping pieces and join them in the middle of each overlap."""
    starts = range(0, len(text) - _OVERLAP, _PIECE - _OVERLAP)
    pieces = [text[start : start + _PIECE] for start in starts]
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    ids: list[int] = []
    ends: list[int] = []
    for start, piece in zip(starts, encoded, strict=True):
        piece_ends = [start + end for _, end in piece.offsets]
        border = start
        if start:
            border = _common_border(ends, piece_ends, start + _OVERLAP // 2)
            kept = bisect_right(ends, border)
            del ids[kept:], ends[kept:]
        first = bisect_right(piece_ends, border) if start else 0
        ids += piece.ids[first:]
        ends += piece_ends[first:]
    return EncodedText(ids, ends)


def _common_border(left: Sequence[int], right: Sequence[int], middle: int) -> int:
    """Return the character nearest to `middle` where tokens of both encodings end."""
    low, high = middle - _OVERLAP // 2, middle + _OVERLAP // 2
    common = {end for end in left[bisect_right(left, low) :]} & {
        end for end in right[: bisect_right(right, high)]
    }
    inside = [end for end in common if low < end < high]
    return min(inside, key=lambda end: (abs(end - middle), end), default=middle)
