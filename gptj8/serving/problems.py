"""Responses to requests that fail, in the format of the path.

Under /v1 that is OpenAI's, `{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`,
from whose status its clients choose their exceptions: 400 for invalid values, 429 if too many
requests are waiting. Everywhere else it is `{"detail": ...}`, with 422 and 503. The reason is
always one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gptj8.runtime.messages import one_line
from gptj8.serving.requests import explain, name_of

OPENAI = "/v1/"
"""Paths with OpenAI's format begin with this."""

_MAX_PROBLEMS = 3  # problems to report per request; every key can cause one
_RETRY_AFTER = {"Retry-After": "1"}
_OPENAI_STATUS = {422: 400}
_STATUS = {429: 503}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class RejectedError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        reason: one line for the client.
        code: OpenAI's name for the reason, such as `model_not_found`.
        param: the parameter that is wrong.
    """

    def __init__(
        self, status: int, reason: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code
        self.param = param


def problem(path: str, error: RejectedError) -> JSONResponse:
    """Return the response for a request to a path that failed."""
    is_openai = path.startswith(OPENAI)
    status = (_OPENAI_STATUS if is_openai else _STATUS).get(error.status, error.status)
    headers = _RETRY_AFTER if status in (429, 503) else None
    return JSONResponse(problem_body(path, error), status, headers)


def problem_body(path: str, error: RejectedError) -> dict[str, Any]:
    """Return the body of a response or event for a request to a path that failed."""
    reason = one_line(str(error))
    if not path.startswith(OPENAI):
        return {"detail": reason}
    kinds = {429: "rate_limit_error"}
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    code = error.code or _CODES.get(error.status)
    kind = kinds.get(error.status, kind)
    return {"error": {"message": reason, "type": kind, "param": error.param, "code": code}}


def add_handlers(app: FastAPI) -> None:
    """Make an application answer its errors in the format of the path."""

    @app.exception_handler(RejectedError)
    async def rejected(request: Request, error: RejectedError) -> JSONResponse:
        return problem(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if "json" not in kind:
            reason = f"send JSON with Content-Type: application/json, not {kind!r}"
            return problem(request.url.path, RejectedError(415, reason))
        found = _clear(error.errors(), error.body)
        reason = "; ".join(list(dict.fromkeys(map(explain, found)))[:_MAX_PROBLEMS])
        param = name_of(found[0]) or None
        return problem(request.url.path, RejectedError(422, reason, param=param))

    @app.exception_handler(HTTPException)
    async def unreadable(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI reports invalid UTF-8 and excessive nesting with a less specific message.
        reason = "the body is not JSON in UTF-8" if error.status_code == 400 else error.detail
        response = problem(request.url.path, RejectedError(error.status_code, reason))
        response.headers.update(_as_headers(error.headers))  # Allow of 405
        return response


def _as_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    return dict(headers or {})


def _clear(found: Sequence[Any], body: Any) -> list[Any]:
    """Return pydantic's errors with the places of the body where they are.

    A value that may have several types has the errors of each type. That it has another type is
    left out if there is an error of a type that it has.
    """
    placed = [{**each, "loc": _place(each, body)} for each in found]
    return [
        each
        for each in placed
        if not each["type"].endswith("_type")
        or not any(
            other["loc"][: len(each["loc"])] == each["loc"]
            and (len(other["loc"]) > len(each["loc"]) or not other["type"].endswith("_type"))
            for other in placed
        )
    ]


def _place(found: Any, body: Any) -> tuple[Any, ...]:
    """Return the keys and indices that lead to an error, without pydantic's names of types."""
    parts = found["loc"][1:]  # the first is "body"
    place: list[Any] = []
    for number, part in enumerate(parts, 1):
        is_missing = found["type"] == "missing" and number == len(parts)
        if isinstance(body, dict) and (part in body or is_missing):
            place.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            place.append(part)
            body = body[part]
    return tuple(place)
