"""Validate a dataset: find data that harms fine-tuning, and apply the policies for it.

`validate` goes from params to a prepared dataset in three passes. The first reads, checks and
tokenizes rows in batches (`gptj8.dataset.validation.scan`) and keeps a few bytes per row. The
second uses those bytes to compare rows: duplicates within a split, leaks between splits,
near-duplicates, and texts with different answers (`gptj8.dataset.validation.relations`). The third
writes the remaining rows. They are in `gptj8.dataset.validation.passes`. No row is dropped
silently: each dropped row has a finding. What no policy can fix is a problem, and all problems of a
dataset are collected before it is rejected.

Memory is bounded by a few batches and about 60 bytes per row; see
`gptj8.dataset.validation.row_store`. All checks are exact, except that some near-duplicates are
missed; see `gptj8.dataset.validation.near_duplicates`. Two texts are equal if they have the same
`gptj8.dataset.readers.sources.content_key`, which ignores whitespace and Unicode form.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from pathlib import Path

from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.formats import describe_files, require_optional_columns, with_format_of
from gptj8.dataset.readers.options import borders_of, read_options
from gptj8.dataset.readers.plain_text import choose_text_row, passage_size
from gptj8.dataset.readers.row_shapes import shape_of
from gptj8.dataset.readers.sources import Sources, find_sources
from gptj8.dataset.validation.findings import Findings, copy_dropped
from gptj8.dataset.validation.passes import Passes
from gptj8.dataset.validation.row_store import RowStore
from gptj8.dataset.validation.scan import Scanner
from gptj8.dataset.validation.validated import Validated
from gptj8.params.sections import Data

FINDINGS_FILE = "findings.parquet"
REJECTED_FILE = "rejected.parquet"


def validate(
    data: Data,
    encoder: TextEncoder,
    directory: str | Path,
) -> Validated:
    """Read, check and split the dataset that `data` describes, and write it for training.

    Args:
        data: the params.
        encoder: the model's tokenizer.
        directory: an empty directory for the findings and the prepared dataset, which is complete
            only if there are no problems. Temporary files need a few bytes per row.

    Raises:
        UserError: one line per reason why files cannot be read.
    """
    started = time.monotonic()
    sources = find_sources(data)
    scanner, notes = _scanner(data, encoder, sources)
    directory = Path(directory)
    scratch = directory / ".scratch"
    try:
        with (
            closing(Findings(directory / FINDINGS_FILE)) as findings,
            closing(RowStore(scratch)) as store,
        ):
            validated = Validated(data.task, sources.files, findings, ignored=sources.ignored)
            validated.notes += notes
            Passes(data, scanner, validated, store).run(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    copy_dropped(directory / FINDINGS_FILE, directory / REJECTED_FILE)
    validated.seconds = time.monotonic() - started
    return validated


def _scanner(data: Data, encoder: TextEncoder, sources: Sources) -> tuple[Scanner, list[str]]:
    """Return the scanner for a dataset, and notes on what was found out about its files."""
    shape, train = shape_of(data), sources.files["train"]
    borders = borders_of(encoder.eos)
    notes = ["labels are the names of the folders"] if sources.folder_labels else []
    text_row = data.text_row
    if text_row == "auto":
        text_row, why = "line", ""
        if data.task == "text":
            text_row, why = choose_text_row(train, borders, data.encoding)
        notes += [f"data.text_row: {text_row}, because {why}"] if why else []
    size = sum(file.stat().st_size for file in train)
    options = read_options(
        data, shape, text_row, borders, passage_size(size), sources.folder_labels
    )
    require_optional_columns(sources.all_files, options, shape.expected)
    notes += describe_files(sources.all_files, options)
    return Scanner(data, encoder, with_format_of(train[0], options)).informed(train), notes
