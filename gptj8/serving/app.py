"""The HTTP server: /generate, /classify and /health, documented at /docs.

An invalid request gets a 4xx status with the reason in one line under `detail`. The status is 503
if too many requests are waiting and 504 if a request times out.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as StarletteHTTPException

from gptj8.dataset.prepared.prompts import EncodedPrompt
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.runtime.version import __version__
from gptj8.serving.engine import BusyError, Engine
from gptj8.serving.predictor import AnswerStream
from gptj8.serving.requests import (
    ClassifyRequest,
    ClassifyResponse,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
    explain,
)

_CLOSED = "the server is shutting down"
_GRACE_SECONDS = 10.0
_BEARER = HTTPBearer(auto_error=False, description="the server's token")
_PUBLIC = ("/health", "/docs", "/openapi.json", "/static-offline-docs")
"""Paths that need no token, so that a browser can open the documentation."""
_MAX_PROBLEMS = 3  # problems to report per request; every key can cause one


@dataclass(frozen=True)
class Limits:
    """Limits for one request.

    Attributes:
        max_prompt_tokens: maximum prompt length; None for the model's context length.
        max_new_tokens: requests for more tokens are rejected.
        max_body_bytes: maximum size of the request body.
        seconds: timeout after the request was received.
        seconds_to_send: timeout for receiving the request, counted from its first byte or from the
            opening of its connection.
    """

    max_prompt_tokens: int | None = None
    max_new_tokens: int = 512
    max_body_bytes: int = 1 << 20
    seconds: float = 300.0
    seconds_to_send: float = 30.0


class _RejectedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def create_app(
    engine: Engine,
    limits: Limits = Limits(),  # immutable, so the default can be shared
    token: str | None = None,
) -> FastAPI:
    """Return the application, which closes the engine on shutdown.

    Args:
        engine: engine that runs the requests.
        limits: limits for each request.
        token: token that requests must send as `Authorization: Bearer TOKEN`; None for no
            authentication. /health never needs it.
    """
    predictor = engine.predictor

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPIOffline(
        title="gptj8",
        version=__version__,
        summary=predictor.name,
        lifespan=lifespan,
    )
    app.add_middleware(_BodyLimit, limits.max_body_bytes, limits.seconds_to_send)
    documented = []  # adds the Authorize button to /docs
    if token is not None:
        app.add_middleware(_Token, token)  # added last, so it runs first
        documented = [Depends(_BEARER)]

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if "json" not in kind:
            return _problem(415, f"send JSON with Content-Type: application/json, not {kind!r}")
        return _problem(422, "; ".join(map(explain, error.errors()[:_MAX_PROBLEMS])))

    @app.exception_handler(StarletteHTTPException)
    async def unreadable(request: Request, error: StarletteHTTPException) -> JSONResponse:
        # FastAPI reports invalid UTF-8 and excessive nesting with a less specific message.
        reason = "the body is not JSON in UTF-8" if error.status_code == 400 else error.detail
        return _problem(error.status_code, reason)

    @app.exception_handler(_RejectedError)
    async def rejected(request: Request, error: _RejectedError) -> JSONResponse:
        return _problem(error.status, str(error))

    @app.get("/health")
    async def health() -> HealthResponse:
        """Return the model, its task and the number of active and waiting requests."""
        task = predictor.task.shape.task if predictor.task else None
        return HealthResponse(
            status="ok",
            model=predictor.name,
            task=task,
            labels=list(predictor.labels),
            active=engine.active,
            waiting=engine.waiting,
        )

    @app.post("/classify", response_model=ClassifyResponse, dependencies=documented)
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        """Return the most likely label of a row and the probability of each label."""
        prompt = await asyncio.to_thread(
            _encoded, predictor.encode_for_labels, body.row, limits.max_prompt_tokens
        )
        future = _submitted(engine.classify, prompt.ids)
        probabilities = await _outcome(request, future, limits.seconds)
        scores = dict(zip(predictor.labels, probabilities.tolist(), strict=True))
        label = max(scores, key=scores.__getitem__)
        return ClassifyResponse(label=label, scores=scores, cut_tokens=prompt.cut_tokens)

    @app.post("/generate", response_model=GenerateResponse, dependencies=documented)
    async def generate(
        body: GenerateRequest, request: Request
    ) -> GenerateResponse | StreamingResponse:
        """Continue a prompt or answer a row; with `stream`, send server-sent events.

        Each event contains `text`. The last event is the response that is sent without `stream`.
        """
        body = body.with_default_tokens(predictor, limits.max_new_tokens)
        if body.max_new_tokens > limits.max_new_tokens:
            reason = (
                f"max_new_tokens = {body.max_new_tokens} exceeds the limit of "
                f"{limits.max_new_tokens}"
            )
            raise _RejectedError(422, reason)
        prompt = await asyncio.to_thread(_encoded, body.encode, predictor, limits.max_prompt_tokens)
        pieces = _Pieces(AnswerStream(predictor.encoder, prompt.ids, body.row is not None))
        future = _submitted(engine.generate, prompt.ids, body.sampling, pieces.put)
        if body.stream:
            return _EventStream(_events(pieces, future, prompt, limits.seconds), future)
        row = await _outcome(request, future, limits.seconds)
        return _generated(pieces, row, prompt)

    return app


class Server(uvicorn.Server):
    """A uvicorn server that cancels running requests on shutdown and closes stalled connections.

    Without the cancellation, a stream would delay the shutdown and then be cut off. A connection is
    stalled if no complete request head arrives or the response is not read. Each connection uses
    one of the process's file descriptors.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, limits: Limits) -> None:
        super().__init__(config)
        self._engine = engine
        self._limits = limits
        self._seen: dict[Any, tuple[Any, bool, float]] = {}

    async def on_tick(self, counter: int) -> bool:
        """Check the connections; called ten times per second."""
        now, before, self._seen = time.monotonic(), self._seen, {}
        waiting = self._limits.seconds_to_send
        answering = waiting + self._limits.seconds + _GRACE_SECONDS
        for connection in self.server_state.connections:
            request = getattr(connection, "cycle", None)  # uvicorn's latest request
            is_over = request is None or request.response_complete
            known, was_over, since = before.get(connection, (None, False, now))
            if known is not request or was_over != is_over:
                since = now
            self._seen[connection] = (request, is_over, since)
            if is_over and now - since > waiting:
                connection.transport.close()
            elif not is_over and now - since > answering:
                connection.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, *arguments: Any, **keywords: Any) -> None:
        """Close the engine, then shut down the connections."""
        await asyncio.to_thread(self._engine.close)
        await super().shutdown(*arguments, **keywords)


class _Token:
    """Middleware that requires the token for every path except `_PUBLIC`.

    The routes declare the same HTTPBearer for the documentation. As a dependency alone it would
    run after the body was received.
    """

    def __init__(self, app: Any, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(_PUBLIC):
            given = await _BEARER(Request(scope))
            sent = given.credentials.encode() if given else b""
            if not hmac.compare_digest(sent, self._token):
                rejection = _problem(401, "send Authorization: Bearer and the server's token")
                rejection.headers["WWW-Authenticate"] = "Bearer"
                await rejection(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _BodyLimit:
    """Middleware that rejects bodies that are too large or do not arrive in time.

    A Content-Length above the limit is rejected immediately, a chunked body as soon as it exceeds
    the limit. Unlike FastAPI's own limit, the response is JSON.
    """

    def __init__(self, app: Any, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._reason = f"the body has more than {max_bytes} bytes"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length = dict(scope.get("headers", ())).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            await _problem(413, self._reason)(scope, receive, send)
            return
        received, is_complete = 0, False
        end = time.monotonic() + self._seconds

        async def counted() -> Any:
            nonlocal received, is_complete
            if is_complete:  # the next message is the disconnect, which has no timeout
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                reason = f"the body did not arrive within {self._seconds:g} s"
                raise HTTPException(408, reason) from None
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise HTTPException(413, self._reason)
            return message

        await self._app(scope, counted, send)


class _Pieces:
    """Pass the text of one answer from the engine's thread to the event loop."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()

    @property
    def text(self) -> str:
        return self._stream.text

    def put(self, token: int) -> None:
        if piece := self._stream.put(token):
            self._loop.call_soon_threadsafe(self.queue.put_nowait, piece)

    def end(self, future: Future) -> None:
        self._loop.call_soon_threadsafe(self.queue.put_nowait, None)


class _EventStream(StreamingResponse):
    """Server-sent events; cancels the request when the response ends for any reason.

    The event generator cannot do this, because it never starts if the client disconnects first.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], future: Future) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._future = future

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self._future.cancel()


async def _events(
    pieces: _Pieces, future: Future, prompt: EncodedPrompt, seconds: float
) -> AsyncIterator[str]:
    future.add_done_callback(pieces.end)
    end = time.monotonic() + seconds
    try:
        while (
            piece := await asyncio.wait_for(pieces.queue.get(), end - time.monotonic())
        ) is not None:
            yield _event({"text": piece})
    except TimeoutError:
        yield _event({"detail": _timed_out(seconds)})
        return
    if future.cancelled():
        yield _event({"detail": _CLOSED})
    elif fault := future.exception():
        yield _event({"detail": _fault(fault)})
    else:
        yield _event(_generated(pieces, future.result(), prompt).model_dump())


async def _outcome(request: Request, future: Future, seconds: float) -> Any:
    """Wait for the engine's result.

    Raises:
        _RejectedError: if the client disconnects, the request times out, the engine is closed or
            the model fails.
    """
    done = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(request.receive())  # after the body comes only the disconnect
    try:
        await asyncio.wait({done, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        future.cancel()
    if not done.done():
        if gone.done():
            raise _RejectedError(499, "the client disconnected")
        raise _RejectedError(504, _timed_out(seconds))
    if done.cancelled():
        raise _RejectedError(503, _CLOSED)
    if fault := done.exception():
        raise _RejectedError(500, _fault(fault)) from fault
    return done.result()


def _encoded(encode: Any, *arguments: Any) -> EncodedPrompt:
    try:
        return encode(*arguments)
    except ValueError as error:
        raise _RejectedError(422, str(error)) from error


def _submitted(submit: Any, *arguments: Any) -> Future:
    try:
        return submit(*arguments)
    except BusyError as error:
        raise _RejectedError(503, str(error)) from error


def _generated(pieces: _Pieces, row: Any, prompt: EncodedPrompt) -> GenerateResponse:
    return GenerateResponse(
        completion=pieces.text,
        finish_reason=row.finish_reason,
        prompt_tokens=row.prompt_length,
        new_tokens=len(row.ids),
        cut_tokens=prompt.cut_tokens,
    )


def _problem(status: int, reason: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": one_line(reason)}, status, headers)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _timed_out(seconds: float) -> str:
    return f"timed out after {seconds:g} s"


def _fault(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"the model failed: {type(error).__name__}"
