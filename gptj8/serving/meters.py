"""Measurements of the server for Prometheus, at /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gptj8.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Meters:
    """Count requests and tokens, and read the engine's load.

    Args:
        engine: engine whose load is shown.
    """

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "gptj8_requests", "Finished requests.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "gptj8_request_seconds",
            "Time from the head of a request to the end of its response.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "gptj8_time_to_first_token_seconds",
            "Time from the acceptance of a prompt to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "gptj8_tokens", "Tokens of prompts and answers.", ["kind"], registry=registry
        )
        for kind in ("prompt", "answer"):
            self._tokens.labels(kind)  # 0 until the first request
        for name, text, read in (
            ("active_rows", "Answers that are being generated.", lambda: engine.active),
            ("waiting_requests", "Requests that have not started.", lambda: engine.waiting),
            (
                "cache_tokens",
                "Tokens whose keys and values are in memory, with padding.",
                lambda: engine.cache_tokens,
            ),
            (
                "cache_tokens_limit",
                "Maximum of gptj8_cache_tokens.",
                lambda: engine.max_cache_tokens,
            ),
        ):
            Gauge(f"gptj8_{name}", text, registry=registry).set_function(read)

    def answer(self, prompt_tokens: int) -> Callable[[], None]:
        """Begin an answer and return a function to call with each of its tokens.

        Args:
            prompt_tokens: tokens of its prompt, which are counted with the first token.
        """
        begun: float | None = time.monotonic()

        def measured() -> None:
            nonlocal begun
            if begun is not None:
                self._first_token.observe(time.monotonic() - begun)
                self.prompt(prompt_tokens)
                begun = None
            self._tokens.labels("answer").inc()

        return measured

    def prompt(self, tokens: int) -> None:
        """Count the tokens of a prompt that was read."""
        self._tokens.labels("prompt").inc(tokens)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return the measurements in Prometheus's text format."""
        return generate_latest(self._registry)


class RequestMeter:
    """Middleware that counts requests by path and status.

    Args:
        app: the application.
        meters: where they are counted.
    """

    def __init__(self, app: Any, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 499  # of a client that leaves before the response

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # Only paths of routes, so that a client cannot create a counter for each path.
            path = getattr(scope.get("route"), "path", "other")
            self._meters.request(path, status, time.monotonic() - begun)
