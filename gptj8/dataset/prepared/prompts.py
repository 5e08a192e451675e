"""Convert rows to token ids; shared by training, evaluation, export and serving.

A prompt is `before + text + after`: the template split at its field. The three parts are tokenized
separately. If a prompt is too long, only the text is cut, never the template or the answer, and
every caller gets the same ids.

`<|endoftext|>` inside a row is tokenized as ordinary characters and can never end a document or an
answer. Only the `tokenizers` library is needed, so `validate` does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from gptj8.params.templates import split_at_fields
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line

_PIECE = 1 << 16
_SLOW_TOKENIZER_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


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
        room: the number of tokens available for the text; below 1 the example is unusable.
    """

    ids: list[int]
    prompt_length: int
    cut_tokens: int
    room: int


class TextEncoder:
    """Tokenize text; the text itself never produces a special token.

    Attributes:
        prefix_ids: the tokens that the tokenizer puts before every text, such as Llama's BOS.
        eos_id: the token that ends a completion.
        vocab_size: all ids are below it; the model may have more embedding rows.
        special_tokens: the special tokens as text.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy; the caller's is unchanged
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.prefix_ids: list[int] = tokenizer.encode("").ids
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.special_tokens = tuple(
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        )
        self.eos_id = eos_id
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

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
        file = model_path / "tokenizer.json"
        if file.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception
                raise UserError(f"{file} is not a tokenizer: {error}") from None
        else:
            tokenizer = _convert_slow_tokenizer(model_path)
        encoder = cls(tokenizer, _find_eos_id(model_path, tokenizer))
        rows = _read_optional_json(model_path / "config.json").get("vocab_size")
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
        """Return the ids of each text; the tokenizer uses all cores.

        A text of more than `_PIECE` characters is encoded in pieces that start at a space where
        possible. This limits memory: a tokenizer needs 100 bytes per character of a word, so a cell
        of 10 MB without a space would take 1 GB.
        """
        pieces = [_pieces(text) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        return [
            next(encoded).ids
            if len(text) == 1
            else [token for _ in text for token in next(encoded).ids]
            for text in pieces
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling loses `encode_special_tokens`, so the constructor has to set it again.
        return TextEncoder, (self._tokenizer, self.eos_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self) -> Callable[[int], str]:
        """Return a function that decodes one id per call.

        Each call returns the text that the id adds, which is empty while a character is incomplete.
        """
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


class PromptEncoder:
    """Render rows through a template and limit their length.

    Args:
        encoder: the model's tokenizer.
        template: text with one field in braces, for example `"{text}\\n\\nLabel:"`.
        max_length: tokens of prompt and completion together.
        truncation_side: `right` cuts a text that is too long at its end, `left` at its start.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        template: str,
        max_length: int,
        truncation_side: Literal["left", "right"] = "right",
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.truncation_side = truncation_side
        before, *after = split_at_fields(template)[0]
        self.before, self.after = before, "".join(after)
        self._before_ids = encoder.encode(self.before)
        self._after_ids = encoder.encode(self.after)

    def completion_ids(self, completion: str) -> list[int]:
        """Return the ids of a completion: a space, the text and the end-of-text token.

        The end-of-text token teaches the model to stop. It also distinguishes a label from another
        label that starts with it (`sql`, `sqlalchemy`).
        """
        return [*self.encoder.encode(" " + completion.strip()), self.encoder.eos_id]

    def prompt(
        self, text: str, reserve: int, examples: Sequence[tuple[str, str]] = ()
    ) -> EncodedPrompt:
        """Encode a prompt that leaves room for `reserve` tokens of completion.

        Args:
            text: the row's text.
            reserve: tokens to keep free after the prompt.
            examples: few-shot examples (text, completion) to put before the prompt. All texts share
                the available tokens evenly; tokens that a short text does not need go to longer
                ones.

        Raises:
            UserError: if the template and the completions leave no room for text in `max_length`.
        """
        completions = [self.completion_ids(completion) for _, completion in examples]
        fixed = len(self._before_ids) + len(self._after_ids)
        room = (
            self.max_length
            - reserve
            - len(self.encoder.prefix_ids)
            - fixed * (len(examples) + 1)
            - sum(map(len, completions))
        )
        if room < len(examples) + 1:
            shots = f", {len(examples)} examples" if examples else ""
            raise UserError(self._no_room(shots))
        texts = [self.encoder.encode(t.strip()) for t in (*(t for t, _ in examples), text)]
        shares = _share_room([len(ids) for ids in texts], room)
        ids = list(self.encoder.prefix_ids)
        for index, (text_ids, share) in enumerate(zip(texts, shares, strict=True)):
            ids += self._before_ids + self._cut(text_ids, share) + self._after_ids
            if index < len(completions):
                ids += completions[index]
        return EncodedPrompt(ids, len(texts[-1]) - shares[-1])

    def examples(
        self, texts: Sequence[str], completions: Sequence[str]
    ) -> Iterator[EncodedExample]:
        """Encode rows for training: each prompt with its complete completion."""
        known = {completion: self.completion_ids(completion) for completion in set(completions)}
        before = [*self.encoder.prefix_ids, *self._before_ids]
        encoded = self.encoder.encode_batch([text.strip() for text in texts])
        for text_ids, completion in zip(encoded, completions, strict=True):
            completion_ids = known[completion]
            fixed = len(before) + len(self._after_ids) + len(completion_ids)
            room = self.max_length - fixed
            prompt = before + self._cut(text_ids, max(room, 0)) + self._after_ids
            cut = max(len(text_ids) - room, 0)
            yield EncodedExample(prompt + completion_ids, len(prompt), cut, room)

    def example(self, text: str, completion: str) -> EncodedExample:
        """Encode one row; see `examples`.

        Raises:
            UserError: if the template and the completion leave no room for text in `max_length`.
        """
        (example,) = self.examples([text], [completion])
        if example.room < 1:
            raise UserError(self._no_room(""))
        return example

    def _cut(self, ids: list[int], length: int) -> list[int]:
        if self.truncation_side == "left":
            return ids[max(len(ids) - length, 0) :]
        return ids[:length]

    def _no_room(self, shots: str) -> str:
        return (
            f"data.max_length = {self.max_length} leaves no room for the text after the prompt "
            f"template{shots} and the completion; raise it"
        )


def check_context(model_path: str | Path, max_length: int) -> None:
    """Raise an error if `max_length` exceeds the model's number of positions.

    Raises:
        UserError: with both numbers.
    """
    config = _read_optional_json(Path(model_path) / "config.json")
    for key in ("n_positions", "max_position_embeddings"):
        positions = config.get(key)
        if isinstance(positions, int) and max_length > positions:
            raise UserError(
                f"data.max_length = {max_length} exceeds the {positions} positions of "
                f"{model_path} ({key}); lower it"
            )


def _pieces(text: str) -> list[str]:
    if len(text) <= _PIECE:
        return [text]
    pieces = []
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind(" ", start + 1, start + _PIECE)
        end = start + _PIECE if end < 0 else end
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _share_room(lengths: Sequence[int], room: int) -> list[int]:
    """Divide `room` tokens evenly; tokens that short texts do not need go to longer ones."""
    shares = [0] * len(lengths)
    left = len(lengths)
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        shares[index] = min(lengths[index], room // left)
        room -= shares[index]
        left -= 1
    return shares


def _find_eos_id(model_path: Path, tokenizer: Tokenizer) -> int:
    token = _read_optional_json(model_path / "tokenizer_config.json").get("eos_token")
    if isinstance(token, Mapping):  # an AddedToken
        token = token.get("content")
    if isinstance(token, str) and (known := tokenizer.token_to_id(token)) is not None:
        return known
    eos = _read_optional_json(model_path / "config.json").get("eos_token_id")
    if isinstance(eos, list) and eos:
        eos = eos[0]
    if isinstance(eos, int):
        return eos
    raise UserError(
        f"{model_path}: neither tokenizer_config.json nor config.json sets an eos token"
    )


def _convert_slow_tokenizer(model_path: Path) -> Tokenizer:
    """Convert the tokenizer of an older model without tokenizer.json.

    Such models ship vocab.json and merges.txt, or a sentencepiece file.
    """
    if not any((model_path / name).is_file() for name in _SLOW_TOKENIZER_FILES):
        raise UserError(f"{model_path} has no tokenizer: no tokenizer.json, vocab.json or *.model")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=False).backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = one_line(error)
        raise UserError(f"{model_path}: the tokenizer cannot be read: {reason}") from None


def _read_optional_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
