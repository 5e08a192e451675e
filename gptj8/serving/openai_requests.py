"""Schemas of the requests of OpenAI's API.

Parameters of OpenAI's API that would change the answer and are not implemented are refused by name,
unless they have the value that changes nothing. Parameters that only label a request are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptj8.serving.requests import WHOLE, Temperature

MAX_CHOICES = 16
"""Most prompts of one request, and most answers to each."""

_NOTHING: tuple[Any, ...] = (None,)
CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": _NOTHING,
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, False, True),
    "prediction": _NOTHING,
    "presence_penalty": (None, 0),
    "reasoning_effort": _NOTHING,
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": _NOTHING,
    "web_search_options": _NOTHING,
}
"""Parameters that are not implemented, with the values that change nothing."""

Stop = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0), WHOLE]
Text = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """What a stream has besides the answer; ignored without `stream`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="a last event with the numbers of tokens")
    include_obfuscation: bool | None = Field(None, description="ignored")


class _OpenAIBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, description="not OpenAI's; 0: all"), WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="ignored")
    metadata: dict[str, str] | None = Field(None, description="ignored")
    store: bool | None = Field(None, description="ignored")
    service_tier: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")
    prompt_cache_key: str | None = Field(None, description="ignored")
    prompt_cache_retention: str | None = Field(None, description="ignored")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        """Drop parameters that are not implemented and change nothing; refuse the others."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name not in CHANGES_NOTHING or name in cls.model_fields:
                kept[name] = value
            elif not any(_equal(value, allowed) for allowed in CHANGES_NOTHING[name]):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return kept

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_OpenAIBody):
    """One prompt or several, as texts or token ids, to be continued."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt

    @property
    def top_logprobs_kept(self) -> int | None:
        """Number of most likely tokens to report for each new token; None for no logprobs."""
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None


class ChatRequest(_OpenAIBody):
    """A conversation, to be continued with the assistant's answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None

    @property
    def tokens(self) -> int | None:
        """The number of new tokens, the smaller of both limits; None for as many as fit."""
        given = [count for count in (self.max_completion_tokens, self.max_tokens) if count]
        return min(given, default=None)

    @property
    def top_logprobs_kept(self) -> int | None:
        """Number of most likely tokens to report for each new token; None for no logprobs.

        `top_logprobs` alone asks for them, too.
        """
        if self.logprobs is None:
            return self.top_logprobs
        return (self.top_logprobs or 0) if self.logprobs else None


def _equal(value: Any, allowed: Any) -> bool:
    """Return whether two JSON values are equal; true and 1 are not."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
