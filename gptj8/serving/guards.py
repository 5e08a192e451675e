"""What protects the server: limits, the token, and timeouts of connections."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import HTTPException, Request
from fastapi.security import HTTPBearer

from gptj8.serving.engine import Engine
from gptj8.serving.problems import RejectedError, problem

BEARER = HTTPBearer(auto_error=False, description="the server's token")
PUBLIC = ("/health", "/docs", "/openapi.json", "/static-offline-docs")
"""Paths that need no token, so that a browser can open the page and the documentation."""

_GRACE_SECONDS = 10.0


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


class TokenGuard:
    """Middleware that requires the token for every path except `PUBLIC` and the page at /.

    The routes declare the same HTTPBearer for the documentation. As a dependency alone it would
    run after the body was received.
    """

    def __init__(self, app: Any, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/":
            given = await BEARER(Request(scope))
            sent = given.credentials.encode() if given else b""
            is_public = scope["path"].startswith(PUBLIC)
            if not is_public and not hmac.compare_digest(sent, self._token):
                error = RejectedError(401, "send Authorization: Bearer and the server's token")
                rejection = problem(scope["path"], error)
                rejection.headers["WWW-Authenticate"] = "Bearer"
                await rejection(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
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
            error = RejectedError(413, self._reason)
            await problem(scope["path"], error)(scope, receive, send)
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
