"""Read and write the prepared dataset, the output of `validate` and the input of later stages.

This module does not import the code that reads and checks the user's files
(`gptj8.dataset.readers.sources`, `gptj8.dataset.validation.run`), so an edit there does not make
DVC retrain on unchanged data.

`<split>.parquet` holds the rows. For the splits that training reads, `<split>.arrow` holds their
tokens as an Arrow stream, which `datasets` memory-maps: training on ten million rows needs no more
memory than training on ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gptj8.dataset.prepared.chat_templates import ChatTemplate
from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.examples import learned_tokens
from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, write_json
from gptj8.runtime.manifest import verify_manifest, write_manifest

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
TRAINED_SPLITS = ("train", "validation")
FIELDS = {
    "classification": ("text", "label"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}

IDS = pa.large_list(pa.int32())
"""Type of the token ids of an example."""
SPANS = pa.large_list(pa.int32())
"""Type of the learned spans of an example."""

_TOKENS = pa.schema(
    [
        ("input_ids", IDS),
        ("learned", SPANS),
        ("length", pa.int32()),
        ("learned_tokens", pa.int32()),
        ("source_row", pa.int64()),
    ]
)


class Chat(NamedTuple):
    """How conversations are written.

    Attributes:
        template: source of the chat template.
        learn: the answers to learn: `all` or `last`.
    """

    template: str
    learn: Literal["all", "last"]


@dataclass(frozen=True)
class PreparedDataset:
    """The output of `validate`.

    Attributes:
        directory: its directory.
        task: `classification`, `completion` or `text`.
        labels: sorted; empty unless the task is classification.
        rows: the number of rows per split.
        prompt_template: the template that turns a row's text into its prompt; it has one field.
        chat: how the conversations are written; None if the rows are prompts.
    """

    directory: Path
    task: str
    labels: tuple[str, ...]
    rows: Mapping[str, int]
    prompt_template: str
    chat: Chat | None = None

    def split(self, name: str) -> pd.DataFrame:
        """Return a split in source order: the task's fields, `file` and `row`.

        Conversations also have `conversation`, their messages as JSON.
        """
        path = self._file(name, SPLITS, "parquet")
        try:
            return pq.read_table(path).to_pandas()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def examples(self, name: str) -> Dataset:
        """Return the training examples of a split, memory-mapped from disk.

        The columns are `input_ids`, `learned` (see `gptj8.dataset.prepared.examples`), `length`
        (the number of tokens), `learned_tokens` (those with a loss) and `source_row` (the row's
        index in `split`; -1 for running text). A row with a prompt and a completion gives one
        example, a conversation one or several. Running text is packed: every example except the
        last has `data.max_length` tokens.
        """
        from datasets import Dataset

        path = self._file(name, TRAINED_SPLITS, "arrow")
        try:
            return Dataset.from_file(str(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def prompt_encoder(self, encoder: TextEncoder, max_length: int) -> PromptEncoder:
        """Return an encoder that builds the same prompts as in the examples.

        Args:
            encoder: the model's tokenizer.
            max_length: tokens of prompt and answer together; `data.max_length` in the examples.
        """
        return PromptEncoder(encoder, self.prompt_template, max_length)

    def conversation_encoder(
        self, encoder: TextEncoder, max_length: int
    ) -> ConversationEncoder | None:
        """Return an encoder of the conversations; None if the rows are prompts."""
        if self.chat is None:
            return None
        return ConversationEncoder(
            ChatTemplate(self.chat.template, encoder), max_length, self.chat.learn
        )

    def end_ids(self, encoder: TextEncoder) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        conversations = self.conversation_encoder(encoder, 0)
        return conversations.end_ids if conversations else encoder.end_ids

    def _file(self, name: str, known: Sequence[str], suffix: str) -> Path:
        if name not in known:
            raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return self.directory / f"{name}.{suffix}"


def load_prepared(directory: str | Path) -> PreparedDataset:
    """Open the directory that `validate` wrote, after verifying its checksums.

    Raises:
        UserError: if it is missing, incomplete or altered.
    """
    directory = Path(directory)
    content = read_json(directory / "dataset.json")
    if verify_manifest(directory) is None:
        raise UserError(f"{directory} has no manifest; rerun validate")
    try:
        return PreparedDataset(
            directory,
            content["task"],
            tuple(content["labels"]),
            dict(content["rows"]),
            content["prompt_template"],
            Chat(**content["chat"]) if content.get("chat") else None,
        )
    except (KeyError, TypeError):
        raise UserError(f"{directory / 'dataset.json'} was not written by validate") from None


class PreparedWriter:
    """Write a prepared dataset batch by batch; equal rows give byte-identical files.

    Args:
        directory: an existing directory. `dataset.json`, which `load_prepared` needs, is written
            after the rows.
        task: `classification`, `completion` or `text`.
        prompt_template: a template with the task's field.
        max_length: length of packed examples in tokens.
        chat: see `PreparedDataset`.
    """

    def __init__(
        self,
        directory: str | Path,
        task: str,
        prompt_template: str,
        max_length: int,
        chat: Chat | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.chat = chat
        self.task = task
        self.prompt_template = prompt_template
        self.rows = dict.fromkeys(SPLITS, 0)
        self.examples = dict.fromkeys(TRAINED_SPLITS, 0)
        more = [] if chat is None else ["conversation"]
        self._columns = [*FIELDS[task], *more, "file", "row"]
        types = [pa.int64() if name == "row" else pa.large_string() for name in self._columns]
        schema = pa.schema(list(zip(self._columns, types, strict=True)))
        self._tables: dict[str, pq.ParquetWriter] = {}
        self._tokens: dict[str, pa.RecordBatchStreamWriter] = {}
        with ExitStack() as files:
            for name in SPLITS:
                file = self.directory / f"{name}.parquet"
                table = pq.ParquetWriter(file, schema, compression="zstd")
                self._tables[name] = files.enter_context(table)
            for name in TRAINED_SPLITS:
                sink = files.enter_context(pa.OSFile(str(self.directory / f"{name}.arrow"), "wb"))
                self._tokens[name] = files.enter_context(pa.ipc.new_stream(sink, _TOKENS))
            self._files = files.pop_all()
        self._packers = {name: _Packer(max_length) for name in TRAINED_SPLITS}

    def add(self, split: str, rows: pa.RecordBatch) -> None:
        """Add rows to a split.

        Their columns are the task's fields, `file`, `row`, and `input_ids` and `learned`, each a
        list with one item per training example of the row.
        """
        if not rows.num_rows:
            return
        self._tables[split].write_batch(rows.select(self._columns))
        before = self.rows[split]
        self.rows[split] += rows.num_rows
        if split not in TRAINED_SPLITS:
            return
        ids = rows.column("input_ids")
        if self.task == "text":
            stream = ids.flatten().flatten().to_numpy()
            self._write_packed(split, self._packers[split].add(stream))
            return
        sources = np.repeat(np.arange(before, self.rows[split]), ids.value_lengths().to_numpy())
        self._write(split, ids.flatten(), rows.column("learned").flatten(), sources)

    def finish(self, labels: Sequence[str]) -> None:
        """Complete all files.

        Args:
            labels: the labels of a classification task, otherwise empty.
        """
        for name, packer in self._packers.items():
            self._write_packed(name, packer.rest())
        self.close()
        content = {
            "task": self.task,
            "labels": sorted(labels),
            "rows": self.rows,
            "prompt_template": self.prompt_template,
            "chat": self.chat._asdict() if self.chat else None,
        }
        write_json(self.directory / "dataset.json", content)
        tables = [self.directory / f"{name}.parquet" for name in SPLITS]
        tokens = [self.directory / f"{name}.arrow" for name in TRAINED_SPLITS]
        # Only the files of the dataset; `validate` also writes its findings to this directory.
        files = [self.directory / "dataset.json", *tables, *tokens]
        write_manifest(self.directory, files=files)

    def close(self) -> None:
        """Close all files; without `finish` the dataset is incomplete."""
        self._files.close()

    def _write_packed(self, split: str, examples: list[np.ndarray]) -> None:
        if examples:
            ids = pa.array(examples, IDS)
            learned = pa.array([[0, len(example)] for example in examples], SPANS)
            self._write(split, ids, learned, np.full(len(examples), -1))

    def _write(self, split: str, ids: pa.Array, learned: pa.Array, rows: np.ndarray) -> None:
        lengths = ids.value_lengths().cast(pa.int32())
        counts = pa.array(map(learned_tokens, learned.to_pylist()), pa.int32())
        arrays = [ids, learned, lengths, counts, pa.array(rows, pa.int64())]
        self._tokens[split].write_batch(pa.RecordBatch.from_arrays(arrays, schema=_TOKENS))
        self.examples[split] += len(ids)


class _Packer:
    """Cut a stream of tokens into examples of equal length."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._left = np.empty(0, dtype=np.int32)

    def add(self, ids: np.ndarray) -> list[np.ndarray]:
        stream = np.concatenate([self._left, ids])
        end = len(stream) // self.length * self.length
        self._left = stream[end:]
        return list(stream[:end].reshape(-1, self.length))

    def rest(self) -> list[np.ndarray]:
        """Return the last, shorter example; a single token has no loss and is dropped."""
        rest, self._left = self._left, self._left[:0]
        return [rest] if len(rest) > 1 else []
