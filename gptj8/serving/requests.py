"""What may be asked, at the terminal and over HTTP, and how it is told what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptj8.dataset.prepared.prompts import EncodedPrompt

if TYPE_CHECKING:
    from gptj8.model.generation.batch import Sampling
    from gptj8.serving.predictor import Predictor

_COLDEST = 0.01  # logits divided by less overflow


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateRequest(_Body):
    """A prompt as it is, or a row of the columns that the model was tuned on."""

    prompt: str | None = None
    row: dict[str, Any] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0, le=10, description="0: the likeliest token")] = 0.0
    top_k: Annotated[int, Field(ge=0, description="0: all tokens")] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _can_be_done(self) -> GenerateRequest:
        if (self.prompt is None) == (self.row is None):
            raise ValueError("send either prompt or row")
        if 0 < self.temperature < _COLDEST:
            raise ValueError(f"temperature is 0 or at least {_COLDEST}")
        return self

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        from gptj8.model.generation.batch import (
            Sampling,  # imports torch, which a refusal need not wait for
        )

        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    def encode(self, predictor: Predictor, max_prompt_tokens: int | None = None) -> EncodedPrompt:
        """Return the ids of its prompt.

        Args:
            predictor: whose tokenizer and task it is for.
            max_prompt_tokens: None: as many as the model's context holds.

        Raises:
            ValueError: if the prompt is empty or has too many tokens, or the row lacks a column.
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
    """`cut_tokens`: how many tokens of a row's text did not fit into the prompt."""

    completion: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    cut_tokens: int


class ClassifyRequest(_Body):
    """A row of the columns that the model was tuned on, without its label."""

    row: dict[str, Any]


class ClassifyResponse(BaseModel):
    """Every label that there is with its probability; `cut_tokens` as in `GenerateResponse`."""

    label: str
    scores: dict[str, float]
    cut_tokens: int


class HealthResponse(BaseModel):
    """What is running: `active` rows are being generated, `waiting` requests not yet begun."""

    status: str
    model: str
    task: str | None
    labels: list[str]
    active: int
    waiting: int


def explain(problem: Any) -> str:
    """Return one line for one of pydantic's errors."""
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}"
    name = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[:1].lower()}{message[1:]}" if name else message
