"""`gptj8 generate` and `gptj8 serve`. Nothing heavy is imported before one of them is chosen."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.runtime.errors import UserError
from gptj8.serving.sockets import bind, listen

if TYPE_CHECKING:
    from gptj8.serving.predictor import Predictor

_TOKEN = "GPTJ8_SERVE_TOKEN"
_BASE, _EXPORT = "artifacts/base-8bit", "artifacts/export"


def add_serving_commands(commands: argparse._SubParsersAction) -> None:
    """Add both to the parser of `gptj8`."""
    generate = commands.add_parser("generate", help="continue a prompt, or answer a row")
    generate.add_argument("prompt", nargs="?", help="as it is; - or none: standard input")
    generate.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="COLUMN=TEXT",
        help="answer a row of the columns that the model was tuned on, instead of a prompt",
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    generate.add_argument("--top-p", type=float, default=1.0, help="default: 1")
    generate.add_argument("--seed", type=int, help="the same seed gives the same text")
    _add_model_arguments(generate)
    generate.set_defaults(command=_generate, computes=True)

    serve = commands.add_parser("serve", help="answer over HTTP: /generate, /classify, /health")
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.add_argument(
        "--max-batch", type=int, default=8, help="rows generated together (default: 8)"
    )
    serve.add_argument("--max-waiting", type=int, default=256, help="more wait (default: 256)")
    serve.add_argument("--max-prompt-tokens", type=int, help="default: what the model has room for")
    serve.add_argument(
        "--max-new-tokens", type=int, default=512, help="of a request (default: 512)"
    )
    serve.add_argument(
        "--max-body-bytes", type=int, default=1 << 20, help="of a request (default: 1 MiB)"
    )
    serve.add_argument(
        "--timeout", type=float, default=300.0, help="seconds a request (default: 300)"
    )
    serve.add_argument(
        "--send-timeout", type=float, default=30.0, help="seconds to send a request (default: 30)"
    )
    serve.add_argument(
        "--max-connections", type=int, default=1024, help="more are turned away (default: 1,024)"
    )
    serve.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"requests must bring what is in it; or set {_TOKEN} (default: anybody may ask)",
    )
    _add_model_arguments(serve)
    serve.set_defaults(command=_serve, computes=True)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=_BASE, help=f"base model (default: {_BASE})")
    parser.add_argument(
        "--adapter", default=_EXPORT, help=f"an export, or none (default: {_EXPORT})"
    )
    parser.add_argument("--dtype", default="auto", help="as model.dtype in params.yaml")


def _load(arguments: argparse.Namespace) -> Predictor:
    export = None if arguments.adapter == "none" else arguments.adapter
    for path, option in ((arguments.model, "--model"), (export, "--adapter")):
        if path is not None and not Path(path).is_dir():
            raise UserError(f"{option} {path} does not exist; run `make repro`, or name another")
    if arguments.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {arguments.dtype} is none of auto, bfloat16, float16, float32")
    from transformers.utils.logging import disable_progress_bar

    from gptj8.serving.predictor import Predictor

    disable_progress_bar()
    return Predictor.load(arguments.model, export, arguments.dtype)


def _generate(arguments: argparse.Namespace) -> None:
    row = _row_of(arguments.row)
    if row and arguments.prompt is not None:
        raise UserError("give either a prompt or --row")
    from pydantic import ValidationError

    from gptj8.serving.requests import GenerateRequest, explain

    prompt = arguments.prompt
    if not row and prompt in (None, "-"):
        try:
            prompt = sys.stdin.buffer.read().decode()  # UTF-8 whatever the terminal speaks
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8: {error}") from None
    try:
        request = GenerateRequest(
            prompt=None if row else prompt,
            row=row or None,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    except ValidationError as error:
        raise UserError("\n".join(map(explain, error.errors()))) from None
    predictor = _load(arguments)
    from gptj8.model.generation.batch import GenerationBatch
    from gptj8.serving.predictor import AnswerStream

    try:
        encoded = request.encode(predictor)
    except ValueError as error:
        raise UserError(str(error)) from None
    if encoded.cut_tokens:
        print(f"{encoded.cut_tokens} tokens of the row did not fit and were cut", file=sys.stderr)
    encoder = predictor.encoder
    batch = GenerationBatch(predictor.model, encoder.vocab_size, encoder.eos_id)
    stream, shown = AnswerStream(encoder, of_row=bool(row)), 0
    (answer,) = batch.add([encoded.ids], [request.sampling])
    while True:
        for token in answer.ids[shown:]:
            print(stream.put(token), end="", flush=True)
            shown += 1
        if answer.finish_reason is not None:
            break
        batch.step()
    print()


def _row_of(cells: list[str]) -> dict[str, str]:
    row = {}
    for cell in cells:
        column, sign, text = cell.partition("=")
        if not sign or not column:
            raise UserError(f"--row {cell}: write COLUMN=TEXT")
        row[column] = text
    return row


def _serve(arguments: argparse.Namespace) -> None:
    positive = ("max_batch", "max_waiting", "max_new_tokens", "max_body_bytes", "timeout")
    for name in (*positive, "send_timeout", "max_connections"):
        if not getattr(arguments, name) > 0:  # nor is NaN
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {getattr(arguments, name)} must be more than 0")
    if arguments.max_prompt_tokens is not None and arguments.max_prompt_tokens < 1:
        raise UserError(f"--max-prompt-tokens {arguments.max_prompt_tokens} must be more than 0")
    token = _token_of(arguments.token_file)
    host = arguments.host
    sockets = bind(host, arguments.port)
    predictor = _load(arguments)
    import uvicorn

    from gptj8.serving.app import Limits, Server, create_app
    from gptj8.serving.engine import Engine

    limits = Limits(
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        max_body_bytes=arguments.max_body_bytes,
        seconds=arguments.timeout,
        seconds_to_send=arguments.send_timeout,
    )
    url = listen(host, sockets)
    engine = Engine(predictor, arguments.max_batch, arguments.max_waiting)
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"whoever reaches {host} can use the model", file=sys.stderr)
    print(f"{predictor.name}: {url} (described at /docs)", flush=True)
    config = uvicorn.Config(
        create_app(engine, limits, token),
        log_level="warning",
        limit_concurrency=arguments.max_connections + 1,  # it counts the one that asks, too
        timeout_graceful_shutdown=10,  # for a client that does not read
    )
    Server(config, engine, limits).run(sockets)


def _token_of(file: str | None) -> str | None:
    """Return the token that requests must bring: a file's or the environment's. On a command line
    it could be read by everybody on the machine."""
    token = os.environ.get(_TOKEN)
    if file is not None:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {file}: {error}") from None
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError("the token must be printable ASCII without spaces, and not empty")
    return token
