"""Schemas of requests and responses for the command line and HTTP, and their error messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptj8.dataset.prepared.prompts import EncodedPrompt
from gptj8.serving.mlflow_model import NEW_TOKENS

if TYPE_CHECKING:
    from gptj8.model.generation.batch import Sampling
    from gptj8.serving.predictor import Predictor

_MIN_TEMPERATURE = 0.01  # logits divided by a smaller value overflow


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateRequest(_Body):
    """An unmodified prompt, or a row with the columns that the model was trained on."""

    prompt: str | None = None
    row: dict[str, Any] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = NEW_TOKENS
    temperature: Annotated[float, Field(ge=0, le=10, description="0: greedy decoding")] = 0.0
    top_k: Annotated[int, Field(ge=0, description="0: all tokens")] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _check(self) -> GenerateRequest:
        if (self.prompt is None) == (self.row is None):
            raise ValueError("send either prompt or row")
        if 0 < self.temperature < _MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {_MIN_TEMPERATURE}")
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
        from gptj8.model.generation.batch import (
            Sampling,  # imports torch; an invalid request is rejected without the delay
        )

        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def encode(self, predictor: Predictor, max_prompt_tokens: int | None = None) -> EncodedPrompt:
        """Return the encoded prompt of the request.

        Args:
            predictor: predictor whose tokenizer and task are used.
            max_prompt_tokens: maximum prompt length; None for the model's context length.

        Raises:
            ValueError: if the prompt is empty or has too many tokens, or the row is invalid.
        """
        room = predictor.context - self.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt: the model "
                f"has {predictor.context} positions"
            )
        if self.row is not None:
            return predictor.encode_row(self.row, self.max_new_tokens, max_prompt_tokens)
        ids = predictor.encode_prompt(self.prompt or "", max_prompt_tokens)
        if len(ids) > room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and with max_new_tokens = "
                f"{self.max_new_tokens} there is room for {room}"
            )
        return EncodedPrompt(ids, 0)


class GenerateResponse(BaseModel):
    """A completion. `cut_tokens` is the number of tokens of a row's text that were truncated."""

    completion: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    cut_tokens: int


class ClassifyRequest(_Body):
    """A row with the columns that the model was trained on, without the label."""

    row: dict[str, Any]


class ClassifyResponse(BaseModel):
    """The most likely label and the probability of each; `cut_tokens` as in `GenerateResponse`."""

    label: str
    scores: dict[str, float]
    cut_tokens: int


class HealthResponse(BaseModel):
    """State of the server: `active` rows are being generated, `waiting` requests are queued."""

    status: str
    model: str
    task: str | None
    labels: list[str]
    active: int
    waiting: int


def explain(problem: Any) -> str:
    """Return a one-line message for a pydantic error."""
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    name = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}" if name else message
