"""The HTTP server: a page, OpenAI's API, /generate, /classify, /health and /metrics.

The routes are documented at /docs. For requests that fail, see `gptj8.serving.problems`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from gptj8.dataset.prepared.prompts import EncodedPrompt
from gptj8.runtime.version import __version__
from gptj8.serving.answers import Answers, EventStream, outcomes, submitted
from gptj8.serving.engine import Engine
from gptj8.serving.guards import BEARER, BodyLimit, Limits, TokenGuard
from gptj8.serving.meters import Meters, RequestMeter
from gptj8.serving.openai_api import openai_routes
from gptj8.serving.openapi import add_description
from gptj8.serving.problems import RejectedError, add_handlers
from gptj8.serving.requests import (
    ClassifyRequest,
    ClassifyResponse,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
)

_LIMITS = Limits()
_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        token: token that requests must send as `Authorization: Bearer TOKEN`; None for no
            authentication. The page, /health and the documentation never need it.
        origins: origins of web pages that browsers let use the server, such as
            `https://example.org`; `*` for all.
    """

    token: str | None = None
    origins: Sequence[str] = ()


_OPEN = Access()


def create_app(
    engine: Engine,
    limits: Limits = _LIMITS,
    access: Access = _OPEN,
    model: str = "gptj8",
) -> FastAPI:
    """Return the application, which closes the engine on shutdown.

    Args:
        engine: engine that runs the requests.
        limits: limits for each request.
        access: who may use the server.
        model: name of the model in OpenAI's API.
    """
    meters = Meters(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPIOffline(
        title="gptj8",
        version=__version__,
        summary=engine.predictor.name,
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit, limits.max_body_bytes, limits.seconds_to_send)
    documented = []  # adds the Authorize button to /docs
    if access.token is not None:
        app.add_middleware(TokenGuard, access.token)
        documented = [Depends(BEARER)]
    app.add_middleware(RequestMeter, meters)
    if access.origins:
        # A browser asks whether it may send a request without sending the token. The last
        # middleware that is added runs first.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends a dozen of its own
        )
    add_handlers(app)
    app.include_router(_public_routes(engine, access))
    app.include_router(_own_routes(engine, limits, meters), dependencies=documented)
    app.include_router(openai_routes(engine, limits, meters, model), dependencies=documented)
    add_description(app, engine.predictor, limits, model, access.token is not None)
    return app


def _public_routes(engine: Engine, access: Access) -> APIRouter:
    """Return the routes that need no token."""
    routes = APIRouter()
    predictor = engine.predictor

    @routes.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """Return a page where a person can use the model."""
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> HealthResponse:
        """Return the model, its task and the number of active and waiting requests."""
        return HealthResponse(
            status="ok",
            model=predictor.name,
            task=predictor.task.shape.task if predictor.task else None,
            labels=list(predictor.labels),
            columns=predictor.task.columns if predictor.task else {},
            active=engine.active,
            waiting=engine.waiting,
            needs_token=access.token is not None,
        )

    return routes


def _own_routes(engine: Engine, limits: Limits, meters: Meters) -> APIRouter:
    """Return the routes of gptj8's own API."""
    routes = APIRouter()
    predictor = engine.predictor

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return measurements for Prometheus."""
        return Response(meters.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.post("/classify")
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        """Return the most likely label of a row and the probability of each label."""
        prompt = await asyncio.to_thread(
            _encoded, predictor.encode_for_labels, body.row, limits.max_prompt_tokens
        )
        future = submitted(engine.classify, prompt.ids)
        (probabilities,) = await outcomes(request, [future], limits.seconds)
        meters.prompt(len(prompt.ids))
        scores = dict(zip(predictor.labels, probabilities.tolist(), strict=True))
        label = max(scores, key=scores.__getitem__)
        return ClassifyResponse(label=label, scores=scores, cut_tokens=prompt.cut_tokens)

    @routes.post("/generate", response_model=GenerateResponse)
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
            raise RejectedError(422, reason)
        prompt = await asyncio.to_thread(_encoded, body.encode, predictor, limits.max_prompt_tokens)
        answers = Answers(engine, limits.seconds, meters)
        answers.submit(prompt.ids, body.sampling, of_row=body.row is not None)
        if body.stream:
            return EventStream(request.url.path, _events(answers, prompt), answers)
        (row,) = await answers.rows(request)
        return _generated(answers, row, prompt)

    return routes


async def _events(answers: Answers, prompt: EncodedPrompt) -> AsyncIterator[dict[str, Any]]:
    async for piece in answers.pieces():
        if piece.text:
            yield {"text": piece.text}
        if piece.row is not None:
            yield _generated(answers, piece.row, prompt).model_dump()


def _encoded(encode: Any, *arguments: Any) -> EncodedPrompt:
    try:
        return encode(*arguments)
    except ValueError as error:
        raise RejectedError(422, str(error)) from error


def _generated(answers: Answers, row: Any, prompt: EncodedPrompt) -> GenerateResponse:
    return GenerateResponse(
        completion=answers.all[0].text,
        finish_reason=row.finish_reason,
        prompt_tokens=row.prompt_length,
        new_tokens=len(row.ids),
        cut_tokens=prompt.cut_tokens,
    )
