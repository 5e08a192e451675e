"""The part of `gptj8 generate` that answers the rows of a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj8.commands.model_arguments import load_predictor
from gptj8.runtime.errors import UserError
from gptj8.runtime.version import __version__

if TYPE_CHECKING:
    from gptj8.dataset.prepared.prompts import EncodedPrompt
    from gptj8.serving.files.answering import Questions
    from gptj8.serving.predictor import Predictor
    from gptj8.serving.requests import GenerateRequest


def answer_rows_of_file(arguments: argparse.Namespace) -> None:
    """Answer the rows of `--input` and write them to `--output`.

    Raises:
        UserError: if the arguments, the file or its rows are invalid.
    """
    source, output = arguments.input, arguments.output
    _check(arguments)
    request = request_of(arguments, row={})
    # What needs no model is checked before one is loaded.
    from gptj8.serving.files.output import suffix_of_output

    suffix_of_output(output)
    from gptj8.serving.files.input import InputFile
    from gptj8.serving.task import TunedTask

    if not Path(arguments.adapter).is_dir():
        raise UserError(f"--adapter {arguments.adapter} does not exist; run `make repro`")
    task = TunedTask.load(arguments.adapter)
    input_file = InputFile.open(source, task)
    from gptj8.serving.files.answering import added_columns, answer_file, check_columns

    added = added_columns(() if is_sampling(arguments) else task.labels)
    check_columns(source, input_file.names or (), added)
    predictor = load_predictor(arguments)
    answer_file(input_file, output, _questions(arguments, predictor, request))


def request_of(arguments: argparse.Namespace, **asked: Any) -> GenerateRequest:
    """Return the checked request for a prompt or a row."""
    from pydantic import ValidationError

    from gptj8.serving.requests import GenerateRequest, explain

    given = arguments.max_new_tokens
    try:
        return GenerateRequest(
            **asked,
            **({} if given is None else {"max_new_tokens": given}),
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    except ValidationError as error:
        raise UserError("\n".join(map(explain, error.errors()))) from None


def is_sampling(arguments: argparse.Namespace) -> bool:
    """Return whether free text is asked for, instead of the most likely label."""
    return arguments.max_new_tokens is not None or arguments.temperature > 0


def _check(arguments: argparse.Namespace) -> None:
    source, output = arguments.input, arguments.output
    if source is None or output is None:
        raise UserError("--input and --output belong together: give both")
    if arguments.row or arguments.prompt is not None:
        raise UserError("give either --input, or --row, or a prompt")
    if arguments.adapter == "none":
        raise UserError("--input needs a fine-tuned model, which knows its columns; set --adapter")
    if arguments.temperature > 0 and arguments.seed is None:
        raise UserError("--temperature with --input needs --seed, to go on after an interruption")
    if source.exists() and not source.is_file():  # a pipe can be read only once
        raise UserError(f"--input {source} is not a regular file; name a file of rows")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    if output.exists() and source.exists() and output.samefile(source):
        raise UserError(f"--output {output} is the input; choose another name")


def _questions(
    arguments: argparse.Namespace, predictor: Predictor, request: GenerateRequest
) -> Questions:
    """Return how rows are answered: as `--row` answers each of them."""
    import torch

    from gptj8.serving.files.answering import Questions
    from gptj8.serving.files.journal import fingerprint

    request = request.with_default_tokens(predictor)
    chooses = bool(predictor.labels) and not is_sampling(arguments)

    def encode(cells: Mapping[str, Any]) -> EncodedPrompt:
        if chooses:
            return predictor.encode_for_labels(cells)
        return request.model_copy(update={"row": cells}).encode(predictor)

    depends_on = {
        "model": fingerprint([Path(arguments.model), Path(arguments.adapter)]),
        "request": request.model_dump(exclude={"prompt", "row", "stream"}),
        "chooses a label": chooses,
        "dtype": str(predictor.model.dtype),
        "device": predictor.model.device.type,
        "versions": [__version__, torch.__version__],
    }
    sampling = None if chooses else request.sampling
    return Questions(predictor, encode, sampling, depends_on, arguments.allow_invalid)
