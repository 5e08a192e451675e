"""`gptj8 serve`: serve a tuned model over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gptj8.commands.model_arguments import add_model_arguments, load_predictor
from gptj8.runtime.errors import UserError
from gptj8.serving.sockets import bind, listen

_TOKEN = "GPTJ8_SERVE_TOKEN"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 serve`."""
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP: /generate, /classify, /health"
    )
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.add_argument(
        "--max-batch", type=int, default=8, help="sequences per generation batch (default: 8)"
    )
    serve.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        help="maximum number of waiting requests (default: 256)",
    )
    serve.add_argument(
        "--max-prompt-tokens", type=int, help="per request (default: the model's context length)"
    )
    serve.add_argument("--max-new-tokens", type=int, default=512, help="per request (default: 512)")
    serve.add_argument(
        "--max-body-bytes", type=int, default=1 << 20, help="per request (default: 1 MiB)"
    )
    serve.add_argument(
        "--timeout", type=float, default=300.0, help="seconds per request (default: 300)"
    )
    serve.add_argument(
        "--send-timeout",
        type=float,
        default=30.0,
        help="seconds for a client to send a request (default: 30)",
    )
    serve.add_argument(
        "--max-connections", type=int, default=1024, help="open connections (default: 1,024)"
    )
    serve.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"file with the token that requests must send; or set {_TOKEN} (default: no token)",
    )
    add_model_arguments(serve)
    serve.set_defaults(command=_serve, computes=True)


def _serve(arguments: argparse.Namespace) -> None:
    positive = ("max_batch", "max_waiting", "max_new_tokens", "max_body_bytes", "timeout")
    for name in (*positive, "send_timeout", "max_connections"):
        if not getattr(arguments, name) > 0:  # also rejects NaN
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {getattr(arguments, name)} must be greater than 0")
    if arguments.max_prompt_tokens is not None and arguments.max_prompt_tokens < 1:
        raise UserError(f"--max-prompt-tokens {arguments.max_prompt_tokens} must be greater than 0")
    token = _token_of(arguments.token_file)
    host = arguments.host
    sockets = bind(host, arguments.port)
    predictor = load_predictor(arguments)
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
        print(
            f"warning: no token is set; anyone who can reach {host} can use the model",
            file=sys.stderr,
        )
    print(f"{predictor.name}: {url} (API docs at /docs)", flush=True)
    config = uvicorn.Config(
        create_app(engine, limits, token),
        log_level="warning",
        limit_concurrency=arguments.max_connections + 1,  # uvicorn also counts the new connection
        timeout_graceful_shutdown=10,  # for clients that do not read their response
    )
    Server(config, engine, limits).run(sockets)


def _token_of(file: str | None) -> str | None:
    """Return the token from a file or the environment, or None.

    Alternative considered: a token on the command line; it was rejected because every user of the
    machine can read it there.
    """
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
