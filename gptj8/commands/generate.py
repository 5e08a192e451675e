"""`gptj8 generate`: continue a prompt, answer a row or all rows of a file, on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.commands.generate_file import answer_rows_of_file, is_sampling, request_of
from gptj8.commands.model_arguments import add_model_arguments, load_predictor
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted, excerpt, one_line

if TYPE_CHECKING:
    from gptj8.serving.predictor import Predictor
    from gptj8.serving.requests import GenerateRequest


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 generate`."""
    generate = commands.add_parser(
        "generate", help="continue a prompt, answer a row, or answer all rows of a file"
    )
    generate.add_argument(
        "prompt", nargs="?", help="the prompt (default, or -: read standard input)"
    )
    generate.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="COLUMN=TEXT",
        help="answer a row instead of a prompt; repeat for each column of the training data, or "
        "give a JSON object. A classification gives the most likely label, or free text with "
        "--max-new-tokens or --temperature",
    )
    generate.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="answer every row of a file (CSV, TSV, JSON Lines, Parquet and others, as data.train)",
    )
    generate.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write the rows of --input with their answers: .csv, .jsonl or .parquet. "
        "After an interruption, the same command goes on where it stopped",
    )
    generate.add_argument(
        "--allow-invalid",
        action="store_true",
        help="leave the answers of rows that cannot be answered empty, instead of refusing the "
        "file",
    )
    generate.add_argument(
        "--max-new-tokens",
        type=int,
        help="default: 64, or what is left of the trained length",
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    generate.add_argument("--top-k", type=int, default=0, help="default: 0, all tokens")
    generate.add_argument("--top-p", type=float, default=1.0, help="default: 1, all tokens")
    generate.add_argument("--seed", type=int, help="sampling seed (default: random)")
    add_model_arguments(generate)
    generate.set_defaults(command=_generate, computes=True)


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.input or arguments.output or arguments.allow_invalid:
        answer_rows_of_file(arguments)
        return
    row = _row_of(arguments.row)
    if row and arguments.prompt is not None:
        raise UserError("give either a prompt or --row, not both")
    request = _request(arguments, row)
    predictor = load_predictor(arguments)
    try:
        if row and predictor.labels and not is_sampling(arguments):
            encoded = predictor.encode_for_labels(row)
            _warn_if_cut(encoded.cut_tokens)
            print(predictor.labels[int(predictor.classify([encoded.ids])[0].argmax())])
            return
        request = request.with_default_tokens(predictor)
        encoded = request.encode(predictor)
    except ValueError as error:
        raise UserError(str(error)) from None
    _warn_if_cut(encoded.cut_tokens)
    _stream(predictor, encoded.ids, request)


def _request(arguments: argparse.Namespace, row: dict[str, Any]) -> GenerateRequest:
    """Return the checked request, with the prompt from standard input if none is given."""
    prompt = arguments.prompt
    if not row and prompt in (None, "-"):
        try:
            prompt = sys.stdin.buffer.read().decode()  # always UTF-8, regardless of the locale
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8: {error}") from None
    return request_of(arguments, prompt=None if row else prompt, row=row or None)


def _warn_if_cut(tokens: int) -> None:
    if tokens:
        print(f"warning: the row was truncated by {counted(tokens, 'token')}", file=sys.stderr)


def _stream(predictor: Predictor, ids: list[int], request: GenerateRequest) -> None:
    """Print the answer token by token."""
    from gptj8.model.generation.batch import GenerationBatch
    from gptj8.serving.predictor import AnswerStream

    encoder = predictor.encoder
    batch = GenerationBatch(predictor.model, encoder.vocab_size, predictor.end_ids)
    stream, shown = AnswerStream(encoder, ids, request.row is not None), 0
    (answer,) = batch.add([ids], [request.sampling])
    while True:
        for token in answer.ids[shown:]:
            print(stream.put(token), end="", flush=True)
            shown += 1
        if answer.finish_reason is not None:
            break
        batch.step()
    print()


def _row_of(cells: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for cell in cells:
        if cell.lstrip().startswith("{"):
            row |= _object_of(cell)
            continue
        column, sign, text = cell.partition("=")
        if not sign or not column:
            raise UserError(f"--row {cell}: write COLUMN=TEXT, or a JSON object")
        row[column] = text
    return row


def _object_of(cell: str) -> dict[str, Any]:
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--row {excerpt(cell)} is not a JSON object: {one_line(error)}") from None
    assert isinstance(found, dict)  # it begins with a brace
    return found
