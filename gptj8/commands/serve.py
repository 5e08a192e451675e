"""`gptj8 serve`: a tuned model that answers over HTTP."""

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
    add_model_arguments(serve)
    serve.set_defaults(command=_serve, computes=True)


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
