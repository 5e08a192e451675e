"""Answer the rows of a file in batches, in bounded memory, and go on after an interruption.

The input is read three times, each time as a stream: to check every row before any of them is
answered, to answer them window by window, and to write them with their answers. Windows hold the
same rows in every run, and their batches are the same, so a run that was interrupted ends with the
same bytes as one that was not.

Alternative considered: to append answers to the output as they are made. It was rejected because
Parquet cannot be appended to, and because a file that is not complete could be taken for one that
is.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from gptj8.dataset.prepared.prompts import EncodedPrompt
from gptj8.dataset.readers.columnar import COLUMNAR, columnar_types
from gptj8.dataset.readers.rows import Row
from gptj8.dataset.readers.text_files import suffix_of
from gptj8.model.generation.answers import plan_answers
from gptj8.model.generation.batch import Sampling
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_file, sha256_file
from gptj8.runtime.locks import locked
from gptj8.runtime.messages import counted, listed, quote
from gptj8.runtime.progress import progress
from gptj8.serving.files.input import InputFile
from gptj8.serving.files.journal import Answers, Journal, RowAnswer
from gptj8.serving.files.output import ColumnTypes, open_output, suffix_of_output
from gptj8.serving.predictor import ROWS_AT_ONCE, Predictor

WINDOW = 1024
"""Rows that are sorted by length and answered before the next ones are read."""

_SHOWN = 20  # rows that cannot be answered are named up to this number
_CLASSIFIED_AT_ONCE = 4 * ROWS_AT_ONCE  # prompts per batch, whose common beginning is read once
_SEEDS = 2**63
_Item = TypeVar("_Item")
_ANSWER, _CONFIDENCE, _PROBABILITY = "answer", "confidence", "probability_"


@dataclass(frozen=True)
class Questions:
    """How the rows of a file are answered.

    Attributes:
        predictor: the model with its task.
        encode: returns the prompt of a row's cells; raises ValueError if it cannot be answered.
        sampling: how answers are generated; None chooses the most likely label. The seed is that
            of the first row; each further row adds one.
        depends_on: everything else that determines the answers, as JSON.
        allow_invalid: leave the answers of rows that cannot be answered empty.
    """

    predictor: Predictor
    encode: Callable[[Mapping[str, Any]], EncodedPrompt]
    sampling: Sampling | None
    depends_on: Mapping[str, Any]
    allow_invalid: bool = False

    def _sampling_of(self, row: int) -> Sampling:
        """Return the sampling of a row: with one seed for all, their answers would be alike."""
        assert self.sampling is not None
        seed = self.sampling.seed
        return replace(self.sampling, seed=None if seed is None else (seed + row) % _SEEDS)

    @property
    def columns(self) -> list[str]:
        """The columns that are added to each row."""
        return added_columns(() if self.sampling else self.predictor.labels)

    def prompt(self, row: Row) -> EncodedPrompt:
        """Return the prompt of a row, with its columns that the model knows.

        Raises:
            ValueError: if it cannot be answered.
        """
        if row.problem:
            raise ValueError(row.problem)
        repeated = getattr(row.cells, "repeated", ())  # keys of a JSON object
        if repeated:
            raise ValueError(f"has the key {quote(repeated[0])} twice")
        task = self.predictor.task
        read = task.read_columns if task else frozenset()
        return self.encode({name: cell for name, cell in row.cells.items() if name in read})

    def batches(self, prompts: Mapping[int, list[int]]) -> Iterator[list[int]]:
        """Yield the keys of the prompts that are answered together, the longest first."""
        keys, ids = list(prompts), list(prompts.values())
        if self.sampling is None:
            order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
            batches = list(_batched(order, _CLASSIFIED_AT_ONCE))
        else:
            tokens = self.sampling.max_new_tokens
            batches = plan_answers(self.predictor.model, ids, tokens, ROWS_AT_ONCE)
        for batch in batches:
            yield [keys[index] for index in batch]

    def ask(self, prompts: Sequence[list[int]], places: Sequence[int]) -> list[RowAnswer]:
        """Return the answers to prompts of the rows at these places of the file."""
        if self.sampling is not None:
            answers = self.predictor.answer(prompts, [self._sampling_of(row) for row in places])
            return [RowAnswer(a.text, _rounded(a.confidence)) for a in answers]
        found = []
        for row in self.predictor.classify(prompts):
            label = self.predictor.labels[int(row.argmax())]
            probabilities = tuple(map(_rounded, row.tolist()))
            found.append(RowAnswer(label, max(probabilities), probabilities))
        return found


@dataclass
class Survey:
    """What the first look at all rows has found.

    Attributes:
        rows: the number of rows.
        invalid: the number of rows that cannot be answered.
        malformed: the number of these whose cells cannot be read.
        cut: the number of rows whose text is truncated.
        names: all columns, in the order of their first appearance.
        types: their types, for Parquet.
        problems: the first rows that cannot be answered, a line each.
    """

    types: ColumnTypes
    rows: int = 0
    invalid: int = 0
    malformed: int = 0
    cut: int = 0
    names: dict[str, None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _batched(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def added_columns(labels: Sequence[str]) -> list[str]:
    """Return the columns that are added to each row; `labels` are empty for generated answers."""
    return [_ANSWER, _CONFIDENCE, *(f"{_PROBABILITY}{label}" for label in labels)]


def check_columns(path: Path, names: Sequence[str], added: Sequence[str]) -> None:
    """Raise UserError if a column of the input has the name of one that is added."""
    taken = [name for name in added if name in set(names)]
    if taken:
        raise UserError(
            f"{path} has the column {listed(taken, 3)} already, which is added to the output; "
            "rename it"
        )


def answer_file(input_file: InputFile, output: Path, questions: Questions) -> None:
    """Answer all rows of a file and write them, with their answers, to `output`.

    `output` is replaced when all rows are answered. Until then, finished answers are in a hidden
    journal beside it.

    Raises:
        UserError: if rows cannot be answered, with a line for each; if the input changes
            meanwhile; or if another process is writing the same output.
    """
    suffix = suffix_of_output(output)
    with locked(output.with_name(f".{output.name}.lock"), wait=False) as held:
        if not held:
            raise UserError(f"--output {output}: another process is writing it")
        content = sha256_file(input_file.path)
        survey = _survey(input_file, questions)
        check_columns(input_file.path, list(survey.names), questions.columns)
        _report(input_file.path, survey, questions.allow_invalid)
        path = output.with_name(f".{output.name}.journal")
        journal = Journal(path, {"input": content, **questions.depends_on})
        try:
            _answer_all(input_file, questions, journal, survey)
            with replace_file(output) as staging:
                _write(input_file, questions, journal, survey, staging, suffix)
                if sha256_file(input_file.path) != content:
                    raise UserError(f"{input_file.path} has changed meanwhile; run this again")
        except KeyboardInterrupt:
            kept = counted(journal.count, "answer")
            print(f"{kept} kept in {path}; the same command goes on", file=sys.stderr)
            raise
        finally:
            journal.close()
        path.unlink()


def _survey(input_file: InputFile, questions: Questions) -> Survey:
    """Look at all rows without answering them."""
    path = input_file.path
    is_columnar = suffix_of(path) in COLUMNAR
    survey = Survey(ColumnTypes(columnar_types(path) if is_columnar else {}))
    survey.names |= dict.fromkeys(input_file.names or ())
    with progress(path.stat().st_size, "checking rows", "bytes") as advance:
        for rows in _batched(input_file.rows(advance), WINDOW):
            for row in rows:
                survey.names |= dict.fromkeys(row.cells)
                try:
                    survey.cut += questions.prompt(row).cut_tokens > 0
                except ValueError as error:
                    survey.invalid += 1
                    survey.malformed += row.problem is not None
                    if len(survey.problems) < _SHOWN:
                        survey.problems.append(f"{path} row {row.number}: {error}")
                if row.warning:
                    print(f"warning: {path} row {row.number} {row.warning}", file=sys.stderr)
            survey.types.add([row.cells for row in rows])
            survey.rows += len(rows)
    return survey


def _report(path: Path, survey: Survey, allow_invalid: bool) -> None:
    """Name the rows that cannot be answered or are truncated.

    Raises:
        UserError: if rows cannot be answered, unless that is allowed.
    """
    lines = list(survey.problems)
    if survey.invalid > len(lines):
        lines.append(f"{path}: {survey.invalid:,} rows cannot be answered; the first are above")
    if survey.malformed:  # there are no cells to keep
        raise UserError("\n".join([*lines, f"{path}: no row was answered; correct these rows"]))
    if lines and not allow_invalid:
        lines.append(
            f"{path}: no row was answered; correct these rows, or leave their answers empty with "
            "--allow-invalid"
        )
        raise UserError("\n".join(lines))
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    if survey.cut:
        print(
            f"warning: the texts of {counted(survey.cut, 'row')} are too long and were truncated, "
            "as in training",
            file=sys.stderr,
        )


def _windows(input_file: InputFile) -> Iterator[tuple[int, dict[int, Row]]]:
    """Yield the number and the rows of each window, by their index in the file."""
    rows = enumerate(input_file.rows())
    for number, window in enumerate(_batched(rows, WINDOW)):
        yield number, dict(window)


def _answer_all(
    input_file: InputFile, questions: Questions, journal: Journal, survey: Survey
) -> None:
    valid = survey.rows - survey.invalid
    if journal.count:
        print(f"{journal.count:,} of {counted(valid, 'row')} were answered before", file=sys.stderr)
    with progress(valid, "answers", "rows") as advance:
        advance(journal.count)
        for number, rows in _windows(input_file):
            if number < journal.window:
                continue
            done = journal.answers if number == journal.window else {}
            prompts: dict[int, list[int]] = {}
            for index, row in rows.items():
                try:
                    prompts[index] = questions.prompt(row).ids
                except ValueError:
                    continue  # reported before
            for batch in questions.batches(prompts):
                if all(index in done for index in batch):
                    continue
                answers = questions.ask([prompts[index] for index in batch], batch)
                journal.add(number, dict(zip(batch, answers, strict=True)))
                advance(len(batch))


def _write(
    input_file: InputFile,
    questions: Questions,
    journal: Journal,
    survey: Survey,
    path: Path,
    suffix: str,
) -> None:
    """Write all rows with their answers."""
    added = questions.columns
    names = [*survey.names, *added]
    types = {name: survey.types.of(name) for name in survey.names}
    types |= {name: pa.string() if name == _ANSWER else pa.float64() for name in added}
    writer = open_output(path, suffix, names, types)
    finished = journal.windows()
    window, answers = next(finished, (-1, Answers()))
    try:
        for number, rows in _windows(input_file):
            while window < number and (more := next(finished, None)):
                window, answers = more
            found = answers if window == number else {}
            writer.write(
                [{**row.cells, **_cells(added, found.get(index))} for index, row in rows.items()]
            )
    finally:
        writer.close()


def _cells(added: Sequence[str], answer: RowAnswer | None) -> dict[str, Any]:
    if answer is None:
        return dict.fromkeys(added)
    values = [answer.text, answer.confidence, *answer.probabilities]
    return dict(zip(added, values, strict=True))


def _rounded(value: float) -> float:
    """Return a number with six significant digits, which is more than its accuracy."""
    return float(f"{value:.6g}")
