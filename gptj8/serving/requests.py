"""Schemas of requests and responses for the command line and HTTP, and their error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from gptj8.dataset.prepared.prompts import EncodedPrompt
from gptj8.serving.mlflow_model import NEW_TOKENS

if TYPE_CHECKING:
    from gptj8.model.generation.batch import Sampling
    from gptj8.serving.predictor import Predictor

_MIN_TEMPERATURE = 0.01  # logits divided by a smaller value overflow


def _as_integer(value: Any) -> Any:
    """Return 1 for 1.0, which is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_as_integer)
"""Makes an integer one as JSON defines it."""


def _no_tiny_temperature(value: float) -> float:
    if 0 < value < _MIN_TEMPERATURE:
        raise ValueError(f"must be 0 or at least {_MIN_TEMPERATURE}")
    return value


Temperature = Annotated[
    float,
    Field(ge=0, le=10),
    AfterValidator(_no_tiny_temperature),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": 0, "description": "greedy decoding"},
                {"type": "number", "minimum": _MIN_TEMPERATURE, "maximum": 10},
            ]
        }
    ),
]
"""A temperature of sampling."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateRequest(_Body):
    """An unmodified prompt, or a row with the columns that the model was trained on."""

    prompt: str | None = None
    row: dict[str, Any] | None = None
    max_new_tokens: Annotated[int, Field(ge=1), WHOLE] = NEW_TOKENS
    temperature: Temperature = 0.0
    top_k: Annotated[int, Field(ge=0, description="0: all tokens"), WHOLE] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _check(self) -> GenerateRequest:
        if (self.prompt is None) == (self.row is None):
            raise ValueError("send either prompt or row")
        return self

    def with_default_tokens(
        self, predictor: Predictor, limit: int | None = None
    ) -> GenerateRequest:
        """Return the request with as many tokens as its answer may need, unless it sets them.

        Args:
            predictor: predictor whose task is used.
            limit: maximum of the default.
        """
        if "max_new_tokens" in self.model_fields_set:
            return self
        tokens = predictor.answer_tokens if self.row is not None else self.max_new_tokens
        return self.model_copy(update={"max_new_tokens": min(tokens, limit or tokens)})

    @property
    def sampling(self) -> Sampling:
        """Sampling settings of the request."""
        # Imports torch; an invalid request is rejected without the delay.
        from gptj8.model.generation.sampling import Sampling

        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def encode(self, predictor: Predictor, max_prompt_tokens: int | None = None) -> EncodedPrompt:
        """Return the encoded prompt of the request.

        Args:
            predictor: predictor whose tokenizer and task are used.
            max_prompt_tokens: maximum prompt length; None for the model's context length.

        Raises:
            ValueError: if the prompt is empty or has too many tokens, or the row is invalid.
        """
        if self.row is not None:
            return predictor.encode_row(self.row, self.max_new_tokens, max_prompt_tokens)
        ids = predictor.encode_prompt(self.prompt or "", max_prompt_tokens)
        predictor.require_room(len(ids), self.max_new_tokens)
        return EncodedPrompt(ids, 0)


class GenerateResponse(BaseModel):
    """A completion. `cut_tokens` is the number of tokens of a row's text that were truncated."""

    completion: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    cut_tokens: int


class GenerateEvent(BaseModel):
    """A piece of a stream. The last event is a `GenerateResponse`, or says why the stream ends."""

    text: str


class DetailResponse(BaseModel):
    """The body of every response with a status of 400 or more."""

    detail: str


class ClassifyRequest(_Body):
    """A row with the columns that the model was trained on, without the label."""

    row: dict[str, Any]


class ClassifyResponse(BaseModel):
    """The most likely label and the probability of each; `cut_tokens` as in `GenerateResponse`."""

    label: str
    scores: dict[str, float]
    cut_tokens: int


class HealthResponse(BaseModel):
    """State of the server: `active` rows are being generated, `waiting` requests are queued.

    `columns` are those of a row, each with whether it is required.
    """

    status: str
    model: str
    task: str | None
    labels: list[str]
    columns: dict[str, bool]
    active: int
    waiting: int
    needs_token: bool


def explain(problem: Any) -> str:
    """Return a one-line message for a pydantic error."""
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    name = name_of(problem)
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}" if name else message


def name_of(problem: Any) -> str:
    """Return the name of the field of a pydantic error; empty if it is that of the whole body."""
    return ".".join(str(part) for part in problem["loc"] if part != "body")
