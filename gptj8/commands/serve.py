"""`gptj8 serve`: serve a tuned model over HTTP."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from gptj8.commands.model_arguments import add_model_arguments, load_predictor
from gptj8.runtime.errors import UserError
from gptj8.serving.sockets import bind, listen

_TOKEN = "GPTJ8_SERVE_TOKEN"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add `gptj8 serve`."""
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP: a page, OpenAI's API, /generate, /classify"
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
        "--cache-gib",
        type=float,
        help="memory of the keys and values of all sequences in GiB; requests wait until they fit "
        "(default: half of the free memory, or less if no more can be used)",
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
    serve.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin use the server, such as https://example.org, or * for "
        "all; repeat for several (default: none)",
    )
    serve.add_argument(
        "--name", default="gptj8", help="the model's name in OpenAI's API (default: gptj8)"
    )
    add_model_arguments(serve)
    serve.set_defaults(command=_serve, computes=True)


def _serve(arguments: argparse.Namespace) -> None:
    _check(arguments)
    token = _token_of(arguments.token_file)
    host = arguments.host
    sockets = bind(host, arguments.port)
    predictor = load_predictor(arguments)
    import uvicorn

    from gptj8.serving.app import Access, create_app
    from gptj8.serving.engine import Engine
    from gptj8.serving.guards import Limits, Server

    limits = Limits(
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        max_body_bytes=arguments.max_body_bytes,
        seconds=arguments.timeout,
        seconds_to_send=arguments.send_timeout,
    )
    gib = arguments.cache_gib
    engine = Engine(
        predictor,
        arguments.max_batch,
        arguments.max_waiting,
        None if gib is None else int(gib * 2**30),
    )
    if not engine.fits_context:
        print(
            f"warning: keys and values have room for {engine.max_cache_tokens:,} tokens, less than "
            f"the model's context of {predictor.context:,} needs; longer requests are refused "
            "(--cache-gib)",
            file=sys.stderr,
        )
    url = listen(host, sockets)
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: no token is set; anyone who can reach {host} can use the model",
            file=sys.stderr,
        )
    print(f"{predictor.name}: {url} (API docs at /docs)", flush=True)
    config = uvicorn.Config(
        create_app(engine, limits, Access(token, arguments.cors), arguments.name),
        log_level="warning",
        limit_concurrency=arguments.max_connections + 1,  # uvicorn also counts the new connection
        timeout_graceful_shutdown=10,  # for clients that do not read their response
    )
    Server(config, engine, limits).run(sockets)


def _check(arguments: argparse.Namespace) -> None:
    """Raise an error if an option cannot be used."""
    positive = ("max_batch", "max_waiting", "max_new_tokens", "max_body_bytes", "timeout")
    for name in (*positive, "send_timeout", "max_connections", "max_prompt_tokens", "cache_gib"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:  # also rejects NaN
            raise UserError(f"--{name.replace('_', '-')} {value} must be greater than 0")
    if arguments.cache_gib is not None and not math.isfinite(arguments.cache_gib):
        raise UserError(f"--cache-gib {arguments.cache_gib} must be a number")
    if not arguments.name.strip():
        raise UserError("--name must not be empty")
    for origin in arguments.cors:
        parts = urlsplit(origin)
        if origin != "*" and origin != f"{parts.scheme}://{parts.netloc}":
            raise UserError(
                f"--cors {origin} is not an origin; write scheme, host and port only, such as "
                "https://example.org:8443, or *"
            )


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
