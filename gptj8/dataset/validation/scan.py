"""Check and tokenize rows in batches, and compute the facts for the checks across rows.

`Scanner.scan` is a pure function of a batch, so it can run anywhere
(`gptj8.dataset.validation.file_scan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.dataset import IDS, SPANS, Chat
from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.formats import read_batches
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.row_shapes import WHOLE_FIELDS, Shape, shape_of
from gptj8.dataset.readers.sources import content_key
from gptj8.dataset.text import INVISIBLE
from gptj8.dataset.validation import near_duplicates, schemas
from gptj8.dataset.validation.checks import CHECKS, Kind
from gptj8.dataset.validation.conversation_rows import choose_template, encode_conversations
from gptj8.dataset.validation.running_text import BRIEF, encode_parts
from gptj8.dataset.validation.shared_text import SharedText, texts_of_rows
from gptj8.params.sections import Data

_LONGEST_SAMPLED = 20_000  # characters of a cell; longer rows say little about what rows share


@dataclass(frozen=True)
class ScannedBatch:
    """The result of scanning one batch.

    Attributes:
        rows: the valid rows, with the task's fields, `file`, `row`, `tokens` (the length without
            truncation), `cut_tokens` (tokens of the text that do not fit), and `input_ids` and
            `learned` (lists with the ids and the learned spans of each training example). Running
            text has `next_row`, and ids without those that begin and end a text.
        facts: `key_high` and `key_low` (uint64, from the SHA-256 of the text) and `answer` (uint64,
            from the SHA-256 of the answer) per valid row.
        normalized: what is particular to each valid row, to compare for near-duplicates; empty if
            they are not searched for.
        findings: the columns of `gptj8.dataset.validation.findings`, without `split`.
        total, invalid: the number of rows.
        rewritten: the number of conversations whose earlier answers the chat template rewrites.
    """

    file: str
    rows: pa.RecordBatch
    facts: dict[str, np.ndarray]
    normalized: list[str]
    findings: pd.DataFrame
    total: int
    invalid: int
    rewritten: int = 0


@dataclass(frozen=True)
class Scanner:
    """Check and encode the rows of a dataset, batch by batch.

    Attributes:
        data: the params.
        encoder: the model's tokenizer.
        options: how files are read.
        shared: what the rows have in common, by which they are not compared.
    """

    data: Data
    encoder: TextEncoder = field(repr=False)
    options: ReadOptions
    shared: SharedText = field(default_factory=SharedText)

    @cached_property
    def shape(self) -> Shape:
        """The shape of the rows."""
        return shape_of(self.data)

    @cached_property
    def conversations(self) -> ConversationEncoder:
        """The encoder of rows that are conversations.

        Raises:
            UserError: if the chat template cannot be used.
        """
        template = choose_template(self.data, self.shape, self.encoder)
        return ConversationEncoder(template, self.data.max_length, self.data.learn)

    @property
    def chat(self) -> Chat:
        """How conversations are written."""
        return Chat(self.conversations.template.source, self.data.learn)

    @cached_property
    def prompts(self) -> PromptEncoder:
        """The encoder that turns rows into prompts."""
        shape = self.shape
        return PromptEncoder(self.encoder, shape.prompt_template, self.data.max_length)

    @cached_property
    def _schema(self) -> Any:
        return schemas.schema(self.shape, self.data.labels, self.encoder.special_tokens)

    def informed(self, files: Sequence[Path]) -> Scanner:
        """Return a scanner that knows, from the first rows, which columns are lists and what rows
        have in common."""
        if self.shape.answer is None:
            return self
        # Files that cannot be read are reported when all are.
        first = next(read_batches(files, self.options, errors=[]), None)
        if first is None:
            return self
        fields = self.shape.template.fields if self.shape.template else ()
        kinds = {field: first[f"{field}_kind"] for field in fields if field not in WHOLE_FIELDS}
        lists = frozenset(f for f, kind in kinds.items() if 2 * (kind == "list").sum() > len(kind))
        options = replace(self.options, list_fields=lists)
        if lists:
            first = next(read_batches(files, options, errors=[]))
        found = replace(self, options=options)
        if self.data.near_duplicate_threshold is None:
            return found
        lengths = [first[field].str.len().fillna(0) for field in self.shape.columns]
        first = first[pd.concat(lengths, axis=1).max(axis=1) <= _LONGEST_SAMPLED]
        usable = first.drop(index=self._invalid(first)[1])
        if self.shape.is_conversation:
            usable, _, _ = encode_conversations(usable, self.conversations)
        else:
            usable = self.shape.to_fields(usable)
        texts = texts_of_rows(usable, first, self.shape)
        return replace(found, shared=SharedText.of(texts, self.shape.is_conversation))

    def scan(self, batch: pd.DataFrame) -> ScannedBatch:
        """Check and encode one batch, as `gptj8.dataset.readers.formats.read_batches` yields it."""
        failed, invalid = self._invalid(batch)
        valid = batch.drop(index=invalid)
        if self.shape.is_conversation:
            usable, more, rewritten = encode_conversations(valid, self.conversations)
        else:
            (usable, more), rewritten = self._encode_prompts(valid), 0
        failed = pd.concat([failed, more], ignore_index=True) if len(more) else failed
        unusable = valid.index.difference(usable.index, sort=False)
        invalid = np.concatenate([invalid, unusable.to_numpy()])
        findings = self._findings(batch, failed, frozenset(invalid.tolist()))
        texts = usable[self.shape.input]
        facts = self._facts(usable, texts)
        normalized = [""] * len(texts)
        if self.data.near_duplicate_threshold is not None:
            compared = map(self.shared.particular, texts_of_rows(usable, batch, self.shape))
            normalized = [near_duplicates.normalize(text) for text in compared]
        places = ["file", "row"] if self.shape.answer else ["file", "row", "next_row"]
        rows = pd.concat([usable, batch.loc[usable.index, places]], axis=1)
        return ScannedBatch(
            file=batch["file"].iloc[0],
            rows=_record_batch(rows, row_schema(self.shape)),
            facts=facts,
            normalized=normalized,
            findings=findings,
            total=len(batch),
            invalid=len(invalid),
            rewritten=rewritten,
        )

    def _invalid(self, batch: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
        """Return the failures of a batch, and the indices of the rows that they make invalid."""
        failed = schemas.failures(batch, self._schema, self.shape)
        kinds = failed["check"].map(lambda name: CHECKS[name].kind)
        return failed, failed.loc[kinds == Kind.INVALID, "index"].unique()

    def _encode_prompts(self, valid: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the usable rows, encoded, and the failures of the others."""
        fields = self.shape.to_fields(valid)
        encoded = self._encode(fields, valid)
        # All columns may be optional, so a row may be blank.
        blank = fields[self.shape.input].str.strip(INVISIBLE) == ""
        no_room = (encoded.pop("room") < 1) & ~blank
        reason = f"leaves no room for {self.shape.input} within data.max_length"
        reason += f" = {self.data.max_length}"
        empty = self._failed(fields[blank], "empty", self.shape.input, "is empty")
        more = self._failed(fields[no_room], "room", self.shape.answer or "", reason)
        seam = encoded.pop("seam")[~(blank | no_room)]
        shared = self._failed(fields.loc[seam.index[seam != ""]], "seam", self.shape.input, "")
        shared["reason"] = [f"shares the token {text!r} with its answer" for text in seam if text]
        usable = pd.concat([fields, encoded], axis=1)[~(blank | no_room)]
        return usable, pd.concat([empty, more, shared], ignore_index=True)

    def _encode(self, fields: pd.DataFrame, read: pd.DataFrame) -> pd.DataFrame:
        """Tokenize rows; see `ScannedBatch.rows` for the columns.

        Two more are `room`, the number of tokens left for the text, and `seam`, the text of a token
        that belongs to both prompt and answer.
        """
        texts, encoder = fields[self.shape.input].tolist(), self.encoder
        rows: list[tuple[int, int, int, list[list[int]], list[list[int]], str]] = []
        if self.shape.answer is None:
            # Documents are packed end to end and never truncated.
            continues = read["continues"].to_numpy(dtype=bool)
            continued = read["next_row"].to_numpy() > 0
            around = len(encoder.prefix_ids) + 1
            for ids in encode_parts(encoder, texts, continues, continued):
                rows.append((len(ids) + around, 0, 1, [ids], [[0, len(ids)]], ""))
        else:
            for row in self.prompts.examples(texts, fields[self.shape.answer].tolist()):
                tokens = len(row.ids) + row.cut_tokens
                learned = [row.prompt_length, len(row.ids)]
                rows.append((tokens, row.cut_tokens, row.room, [row.ids], [learned], row.seam))
        names = ["tokens", "cut_tokens", "room", "input_ids", "learned", "seam"]
        return pd.DataFrame(rows, fields.index, names)

    def _failed(self, fields: pd.DataFrame, check: str, field: str, reason: str) -> pd.DataFrame:
        found = pd.DataFrame({"index": fields.index, "value": fields.get(field)})
        found = found.assign(check=check, field=field, reason=reason)
        return found[list(schemas.FAILURE_COLUMNS)]

    def _findings(
        self, batch: pd.DataFrame, failed: pd.DataFrame, invalid: frozenset[int]
    ) -> pd.DataFrame:
        suspect = failed["check"].map(lambda name: CHECKS[name].kind) == Kind.SUSPECT
        # Suspect findings of a row that is dropped anyway are not useful.
        failed = failed[~(suspect & failed["index"].isin(invalid))]
        places = batch.loc[failed["index"], ["file", "row"]].reset_index(drop=True)
        failed = failed.reset_index(drop=True)
        return places.assign(
            check=failed["check"],
            column=failed["field"].map(
                lambda field: (
                    "" if field in schemas.ROW_LEVEL_FIELDS else self.shape.column_of(field)
                )
            ),
            value=failed["value"],
            reason=failed["reason"],
            dropped=failed["index"].isin(invalid),
        )

    def _facts(self, fields: pd.DataFrame, texts: pd.Series) -> dict[str, np.ndarray]:
        keys = np.frombuffer(b"".join(content_key(text)[:16] for text in texts), dtype=">u8")
        keys = keys.astype(np.uint64).reshape(-1, 2)
        if self.shape.answer is None:
            answers = np.zeros(len(texts), dtype=np.uint64)
        else:
            hashes = {a: _answer_key(a) for a in fields[self.shape.answer].unique()}
            answers = fields[self.shape.answer].map(hashes).to_numpy(np.uint64)
        found = {"key_high": keys[:, 0], "key_low": keys[:, 1], "answer": answers}
        if self.shape.answer is None:
            found["brief"] = texts.str.len().to_numpy() < BRIEF
        return found


def row_schema(shape: Shape) -> pa.Schema:
    """Return the schema of `ScannedBatch.rows`."""
    fields = [shape.input] + ([shape.answer] if shape.answer else [])
    fields += ["conversation", "cut"] if shape.is_conversation else []
    numbers = ["row"] if shape.answer else ["row", "next_row"]
    return pa.schema(
        [
            *((name, pa.large_string()) for name in (*fields, "file")),
            *((name, pa.int64()) for name in numbers),
            *((name, pa.int32()) for name in ("tokens", "cut_tokens")),
            ("input_ids", pa.large_list(IDS)),
            ("learned", pa.large_list(SPANS)),
        ]
    )


def _record_batch(rows: pd.DataFrame, schema: pa.Schema) -> pa.RecordBatch:
    table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False).combine_chunks()
    batches = table.replace_schema_metadata(None).to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema)


def _answer_key(answer: str) -> int:
    return int.from_bytes(content_key(answer)[:8], "big")
