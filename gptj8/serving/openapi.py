"""The description of the server's API (OpenAPI), as it is for the loaded model.

FastAPI describes the types of parameters and the response of a success. Added here are what it
cannot know: every other status with its body, event streams, the name of the model, the columns of
a row, and which of two parameters must be given. Operations that the model cannot do are left out.
"""

from __future__ import annotations

import warnings
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from gptj8.dataset.readers.row_shapes import WHOLE_FIELDS, kinds_of
from gptj8.dataset.readers.rows import outermost
from gptj8.dataset.text import INVISIBLE
from gptj8.serving.guards import Limits
from gptj8.serving.openai_requests import CHANGES_NOTHING
from gptj8.serving.openai_responses import ChatChunk, ProblemResponse
from gptj8.serving.predictor import Predictor
from gptj8.serving.problems import OPENAI
from gptj8.serving.requests import DetailResponse, GenerateEvent
from gptj8.serving.task import TunedTask

_REASONS = {
    400: "the body is not JSON in UTF-8, or a value is wrong",
    401: "the token is missing or wrong",
    404: "the model does not exist",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    422: "a value is wrong",
    429: "too many requests are waiting",
    500: "the model failed",
    503: "too many requests are waiting, too many connections are open, or the server shuts down",
    504: "the request took too long",
}
_SENT = (400, 408, 413, 415, 422, 500, 503, 504)
_SENT_OPENAI = (400, 404, 408, 413, 415, 429, 500, 503, 504)
_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds to wait"}}
_NONCHARACTERS = "\ufdd0\ufdd1"  # chat templates and tokenizers use them as marks
_EVENTS = {
    "/generate": ("GenerateEvent", "GenerateResponse"),
    "/v1/completions": ("Completion",),
    "/v1/chat/completions": ("ChatChunk",),
}
"""The schemas of the events of a stream."""


def add_description(
    app: FastAPI, predictor: Predictor, limits: Limits, model: str, has_token: bool
) -> None:
    """Make an application describe itself.

    Args:
        app: the application.
        predictor: the loaded model.
        limits: limits for each request.
        model: name of the model in OpenAI's API.
        has_token: whether requests need a token.
    """

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, predictor, limits, model, has_token)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # as FastAPI documents it


def _described(
    app: FastAPI, predictor: Predictor, limits: Limits, model: str, has_token: bool
) -> dict[str, Any]:
    with warnings.catch_warnings():  # operations of a route with several methods share their ids
        warnings.simplefilter("ignore", UserWarning)
        found = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
    if not predictor.labels:
        del found["paths"]["/classify"]
    if not predictor.can_chat:
        del found["paths"]["/v1/chat/completions"]
    schemas = found["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    added = (GenerateEvent, ChatChunk, DetailResponse, ProblemResponse)
    models: Any = [(model, "serialization") for model in added]
    _, more = models_json_schema(models, ref_template="#/components/schemas/{model}")
    schemas.update(more["$defs"])
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            _describe_operation(operation, path, method, has_token)
    for schema in schemas.values():  # FastAPI rounds it to a float
        for kind in schema.get("properties", {}).get("seed", {}).get("anyOf", ()):
            if kind["type"] == "integer":
                kind.pop("exclusiveMaximum")
                kind["maximum"] = 2**63 - 1
                kind["minimum"] = -(2**63) if kind["minimum"] else 0
    _describe_openai(schemas, predictor, limits, model)
    _describe_rows(schemas, predictor, limits)
    return found


def _describe_operation(operation: dict[str, Any], path: str, method: str, has_token: bool) -> None:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "") or "page"
    operation["operationId"] = f"{method}_{name}"
    is_openai = path.startswith(OPENAI)
    responses = operation["responses"]
    responses.pop("422", None)
    sent: tuple[int, ...] = ()
    if method == "post":
        sent = _SENT_OPENAI if is_openai else _SENT
    elif "{" in path:
        sent = (404,)
    body = ProblemResponse if is_openai else DetailResponse
    if has_token and "security" in operation:
        sent = (401, *sent)
    for status in sorted({*sent, 413, 503}):
        responses[str(status)] = _failure(status, body.__name__, method)
    if method == "head":
        responses["200"].pop("content", None)
    if path in _EVENTS and "post" == method:
        responses["200"]["content"]["text/event-stream"] = _events(path, body.__name__)


def _events(path: str, failed: str) -> dict[str, Any]:
    """Return the content of an event stream; its schema is that of one event."""
    names = (*_EVENTS[path], failed)
    content = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    done = {"const": "[DONE]", "description": "the last event"}
    return {
        "schema": {
            "type": "object",
            "description": "an event of the stream, which `stream` asks for",
            "properties": {
                "data": {"anyOf": [data, done]} if path.startswith(OPENAI) else data,
            },
            "required": ["data"],
        }
    }


def _failure(status: int, body: str, method: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}
    }
    found: dict[str, Any] = {"description": _REASONS[status]}
    if status == 503:  # uvicorn's, if too many connections are open
        content["text/plain"] = {"schema": {"type": "string"}}
    if method != "head":
        found["content"] = content
    if status == 429:
        found["headers"] = _RETRY
    if status == 401:
        found["headers"] = {"WWW-Authenticate": {"schema": {"const": "Bearer"}}}
    return found


def _describe_openai(
    schemas: dict[str, Any], predictor: Predictor, limits: Limits, model: str
) -> None:
    tokens_of = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    for token in (tokens_of[2]["items"], tokens_of[3]["items"]["items"]):
        token["maximum"] = predictor.encoder.vocab_size - 1
    for name in ("CompletionRequest", "ChatRequest"):
        if name not in schemas:
            continue
        properties = schemas[name]["properties"]
        properties["model"] = {"type": "string", "enum": [model]}
        for tokens in ("max_tokens", "max_completion_tokens"):
            if tokens in properties:
                properties[tokens]["anyOf"][0]["maximum"] = limits.max_new_tokens
        for param, values in CHANGES_NOTHING.items():
            if param not in properties:
                properties[param] = {"enum": list(values), "description": "not supported"}
    if "ChatMessage" in schemas:
        schemas["ChatMessage"] = _message(schemas["ChatMessage"])
        # A system message without content counts as none.
        others = ["developer", "user", "assistant", "tool", "function"]
        schemas["ChatRequest"]["properties"]["messages"]["contains"] = {
            "anyOf": [{"properties": {"role": {"enum": others}}}, _said()]
        }


def _message(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a message: what a user or the assistant says is not blank."""
    properties = {**schema["properties"]}
    parts = {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}}
    text = {"type": "string", "pattern": f"^[^{_NONCHARACTERS}]*$"}

    def kind(roles: list[str], required: list[str], **own: Any) -> dict[str, Any]:
        own["role"] = {"type": "string", "enum": roles}
        return {
            **schema,
            "properties": {**properties, **own},
            "required": ["role", *required],
        }

    calls = {"type": "array", "items": {"type": "object"}, "minItems": 1}
    optional = {"anyOf": [text, parts, {"type": "null"}]}
    return {
        "title": "ChatMessage",
        "description": schema["description"],
        "anyOf": [
            kind(["developer", "user", "assistant"], ["content"], **_said()["properties"]),
            kind(
                ["developer", "user", "assistant"],
                ["tool_calls"],
                content=optional,
                tool_calls=calls,
            ),
            kind(["system", "tool", "function"], [], content=optional),
        ],
    }


def _said() -> dict[str, Any]:
    """Return the schema of a message with a content that is not blank."""
    part = {"type": "object", "properties": {"text": _visible()}}
    items = {"$ref": "#/components/schemas/TextPart"}
    parts = {"type": "array", "items": items, "contains": part}
    return {"properties": {"content": {"anyOf": [_visible(), parts]}}, "required": ["content"]}


def _describe_rows(schemas: dict[str, Any], predictor: Predictor, limits: Limits) -> None:
    asked = schemas["GenerateRequest"]
    shared = {k: v for k, v in asked["properties"].items() if k not in ("prompt", "row")}
    shared["max_new_tokens"] = {**shared["max_new_tokens"], "maximum": limits.max_new_tokens}
    null: dict[str, Any] = {"type": "null"}
    kinds: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"type": "string", "minLength": 1}, null, "prompt")
    ]
    if predictor.task is not None:
        row = _row(predictor.task)
        kinds.append((null, row, "row"))
        if "ClassifyRequest" in schemas:
            schemas["ClassifyRequest"]["properties"]["row"] = row
    schemas["GenerateRequest"] = {
        "title": asked["title"],
        "description": asked["description"],
        "anyOf": [
            {
                "type": "object",
                "properties": {"prompt": prompt, "row": row, **shared},
                "required": [required],
                "additionalProperties": False,
            }
            for prompt, row, required in kinds
        ],
    }


def _row(task: TunedTask) -> dict[str, Any]:
    """Return the schema of a row; that of any object if a column is inside another."""
    shape = task.shape
    columns = {*task.columns, *shape.columns.values()}
    if shape.is_conversation or any(outermost(name, ()) != name for name in columns):
        return {"type": "object"}
    properties: dict[str, Any] = {}
    for field, column in shape.columns.items():
        if field == shape.answer:
            properties[column] = {"description": "ignored"}
            continue
        numbers = {"type": ["number", "boolean"]}
        lists: dict[str, Any] = {
            "type": "array",
            "items": {"type": ["string", "number", "boolean"]},
            "description": "one item per line",
        }
        cell: dict[str, Any] = {"type": ["string", "null"]}
        if task.columns[column]:
            cell, lists = _visible(), {**lists, "contains": {"anyOf": [_visible(), numbers]}}
        kinds = [cell]
        if "number" in kinds_of(field):
            kinds.append(numbers)
        if field not in WHOLE_FIELDS:
            kinds.append(lists)
        properties[column] = {"anyOf": kinds}
    return {
        "type": "object",
        "properties": properties,
        "required": [column for column, required in task.columns.items() if required],
        "additionalProperties": False,
    }


def _visible() -> dict[str, Any]:
    """Return the schema of a text with at least one visible character."""
    other = f"[^{_NONCHARACTERS}]*"
    return {"type": "string", "pattern": f"^{other}[^{INVISIBLE}{_NONCHARACTERS}]{other}$"}
