"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions.

A request gets the same answer as alone: each answer is a row of the engine's batch. With `n` above
1 and a seed, the answers have the seeds `seed`, `seed + 1` and so on.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from gptj8.model.generation.batch import GeneratedRow
from gptj8.model.generation.sampling import Sampling
from gptj8.runtime.messages import quote
from gptj8.runtime.version import __version__
from gptj8.serving.answers import Answers, AnswerToken, EventStream
from gptj8.serving.engine import Engine
from gptj8.serving.guards import Limits
from gptj8.serving.meters import Meters
from gptj8.serving.openai_requests import ChatRequest, CompletionRequest
from gptj8.serving.openai_responses import (
    AnswerMessage,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    FinishReason,
    Model,
    ModelList,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from gptj8.serving.problems import RejectedError

_COMPLETION_TOKENS = 16  # OpenAI's default
_TOO_LONG = "context_length_exceeded"


def openai_routes(engine: Engine, limits: Limits, meters: Meters, model: str) -> APIRouter:
    """Return the routes of OpenAI's API.

    Args:
        engine: engine that runs the requests.
        limits: limits for each request.
        meters: the server's measurements.
        model: the name that requests must give.
    """
    routes = APIRouter(prefix="/v1")
    known = Model(id=model, created=int(time.time()))
    api = _OpenAI(engine, limits, meters, model)

    @routes.get("/models")
    async def models() -> ModelList:
        """List the model."""
        return ModelList(data=[known])

    @routes.get("/models/{name:path}")
    async def retrieve_model(name: str) -> Model:
        """Return the model."""
        api.require_model(name)
        return known

    @routes.post("/completions", response_model=Completion)
    async def completions(
        body: CompletionRequest, request: Request
    ) -> Completion | StreamingResponse:
        """Continue prompts; with `stream`, send server-sent events, the last of them `[DONE]`."""
        asked = await asyncio.to_thread(api.completion, body)
        answers = api.submit(asked)
        about = _About.of("cmpl", model)
        if body.stream:
            chunks = _completion_chunks(answers, about, asked)
            return EventStream(request.url.path, chunks, answers)
        rows = await answers.rows(request)
        choices = [
            CompletionChoice(
                index=number,
                text=answer.text,
                logprobs=asked.completion_logprobs(answer.tokens),
                finish_reason=row.finish_reason,
            )
            for number, (answer, row) in enumerate(zip(answers.all, rows, strict=True))
        ]
        return Completion(**about.fields, choices=choices, usage=asked.usage(rows))

    @routes.post("/chat/completions", response_model=Chat)
    async def chat_completions(body: ChatRequest, request: Request) -> Chat | StreamingResponse:
        """Answer a conversation; with `stream`, send server-sent events, then `[DONE]`."""
        asked = await asyncio.to_thread(api.chat, body)
        answers = api.submit(asked)
        about = _About.of("chatcmpl", model)
        if body.stream:
            chunks = _chat_chunks(answers, about, asked)
            return EventStream(request.url.path, chunks, answers)
        rows = await answers.rows(request)
        choices = [
            ChatChoice(
                index=number,
                message=AnswerMessage(content=answer.text),
                logprobs=asked.chat_logprobs(answer.tokens),
                finish_reason=_finish_reason(row),
            )
            for number, (answer, row) in enumerate(zip(answers.all, rows, strict=True))
        ]
        return Chat(**about.fields, choices=choices, usage=asked.usage(rows))

    return routes


@dataclass(frozen=True)
class _About:
    """What all objects of one response have in common."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, kind: str, model: str) -> _About:
        return cls(f"{kind}-{uuid.uuid4().hex}", int(time.time()), model)

    @property
    def fields(self) -> dict[str, Any]:
        return {**vars(self), "system_fingerprint": f"gptj8-{__version__}"}


@dataclass(frozen=True)
class _Asked:
    """An encoded request.

    Attributes:
        prompts: token ids of each prompt.
        samplings: sampling settings of the answers to each prompt.
        stop: stop strings.
        has_usage: whether a stream ends with the numbers of tokens.
        text_of: returns the text or name of a token; see `TextEncoder.token_text`.
    """

    prompts: list[list[int]]
    samplings: list[Sampling]
    stop: list[str]
    has_usage: bool
    text_of: Callable[[int], tuple[str, bool]]

    def usage(self, rows: Sequence[GeneratedRow]) -> Usage:
        prompt = sum(map(len, self.prompts))
        new = sum(len(row.ids) for row in rows)
        return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)

    @property
    def has_logprobs(self) -> bool:
        return self.samplings[0].logprobs is not None

    def completion_logprobs(self, tokens: Sequence[AnswerToken]) -> CompletionLogprobs | None:
        if not self.has_logprobs:
            return None
        return CompletionLogprobs(
            tokens=[self.text_of(token.id)[0] for token in tokens],
            token_logprobs=[token.logprobs.chosen for token in tokens],
            top_logprobs=[self._named(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )

    def _named(self, token: AnswerToken) -> dict[str, float]:
        """Return the most likely tokens and the chosen one; of equal texts, the most likely."""
        pairs = [*token.logprobs.top, (token.id, token.logprobs.chosen)]
        return {self.text_of(number)[0]: value for number, value in reversed(pairs)}

    def chat_logprobs(self, tokens: Sequence[AnswerToken]) -> ChatLogprobs | None:
        if not self.has_logprobs:
            return None
        content = []
        for token in tokens:
            top = [TopLogprob(**self._fields(*pair)) for pair in token.logprobs.top]
            own = self._fields(token.id, token.logprobs.chosen)
            content.append(TokenLogprob(**own, top_logprobs=top))
        return ChatLogprobs(content=content)

    def _fields(self, token: int, logprob: float) -> dict[str, Any]:
        text, is_text = self.text_of(token)
        data = list(text.encode()) if is_text else None
        return {"token": text, "logprob": logprob, "bytes": data}


class _OpenAI:
    """Check and encode requests, and submit them to the engine."""

    def __init__(self, engine: Engine, limits: Limits, meters: Meters, model: str) -> None:
        self._engine = engine
        self._predictor = engine.predictor
        self._limits = limits
        self._meters = meters
        self._model = model

    def require_model(self, name: str) -> None:
        if name != self._model:
            reason = f"the model {quote(name)} does not exist; this server has {self._model}"
            raise RejectedError(404, reason, code="model_not_found", param="model")

    def completion(self, body: CompletionRequest) -> _Asked:
        self.require_model(body.model)
        self._check_limit("max_tokens", body.max_tokens)
        prompts = [self._prompt(prompt) for prompt in body.prompts]
        longest = max(map(len, prompts))
        wanted = body.max_tokens or self._as_fits(_COMPLETION_TOKENS, longest)
        self._check_sizes(longest, wanted, "prompt")
        return self._asked(body, prompts, wanted)

    def chat(self, body: ChatRequest) -> _Asked:
        self.require_model(body.model)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            ids, end_id = self._predictor.encode_chat(messages)
        except ValueError as error:
            raise RejectedError(422, str(error), param="messages") from error
        wanted = body.tokens or self._as_fits(self._limits.max_new_tokens, len(ids))
        self._check_limit("max_tokens", body.max_tokens)
        self._check_limit("max_completion_tokens", body.max_completion_tokens)
        self._check_sizes(len(ids), wanted, "messages")
        return self._asked(body, [ids], wanted, (end_id,))

    def submit(self, asked: _Asked) -> Answers:
        answers = Answers(self._engine, self._limits.seconds, self._meters)
        for prompt in asked.prompts:
            for sampling in asked.samplings:
                answers.submit(prompt, sampling, asked.stop)
        return answers

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self._predictor.encode_prompt(prompt)
            except ValueError as error:
                raise RejectedError(422, f"prompt: {error}", param="prompt") from error
        size = self._predictor.encoder.vocab_size
        if (largest := max(prompt)) >= size:
            reason = f"prompt: {largest} is not a token; the model has the tokens 0 to {size - 1}"
            raise RejectedError(422, reason, param="prompt")
        return prompt

    def _as_fits(self, wanted: int, prompt: int) -> int:
        """Return a default for the new tokens, which is never too large by itself."""
        room = self._predictor.context - prompt
        return max(1, min(wanted, room, self._limits.max_new_tokens))

    def _check_limit(self, name: str, wanted: int | None) -> None:
        limit = self._limits.max_new_tokens
        if wanted is not None and wanted > limit:
            raise RejectedError(422, f"{name} = {wanted} exceeds the limit of {limit}", param=name)

    def _check_sizes(self, prompt: int, wanted: int, source: str) -> None:
        """Raise an error if a prompt and its answer are too long."""
        context = self._predictor.context
        most = self._limits.max_prompt_tokens
        if prompt + wanted > context:
            reason = (
                f"the model has {context} positions, and the request needs {prompt + wanted}: "
                f"{prompt} for {source} and {wanted} for the answer"
            )
            raise RejectedError(422, reason, code=_TOO_LONG, param=source)
        if most is not None and prompt > most:
            reason = f"{source} has {prompt} tokens; at most {most} are allowed"
            raise RejectedError(422, reason, code=_TOO_LONG, param=source)

    def _asked(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        max_new_tokens: int,
        end_ids: tuple[int, ...] = (),
    ) -> _Asked:
        count = body.n or 1
        most = self._engine.max_waiting
        if count * len(prompts) > most:
            reason = f"n = {count} for {len(prompts)} prompts: at most {most} answers are possible"
            raise RejectedError(422, reason, param="n")
        samplings = [
            Sampling(
                max_new_tokens=max_new_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_k=body.top_k or 0,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=None if body.seed is None else (body.seed + number) % 2**63,
                logprobs=body.top_logprobs_kept,
                end_ids=end_ids,
            )
            for number in range(count)
        ]
        text_of = self._predictor.encoder.token_text
        return _Asked(prompts, samplings, body.stops, body.has_usage, text_of)


def _finish_reason(row: GeneratedRow) -> FinishReason:
    assert row.finish_reason is not None
    return row.finish_reason


async def _completion_chunks(
    answers: Answers, about: _About, asked: _Asked
) -> AsyncIterator[dict[str, Any]]:
    rows = []
    async for piece in answers.pieces():
        choice = CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=asked.completion_logprobs(piece.tokens),
            finish_reason=piece.row.finish_reason if piece.row else None,
        )
        rows += [piece.row] if piece.row else []
        yield _chunk(Completion(**about.fields, choices=[choice]), asked)
    if asked.has_usage:
        usage = asked.usage(rows)
        yield Completion(**about.fields, choices=[], usage=usage).model_dump()


async def _chat_chunks(
    answers: Answers, about: _About, asked: _Asked
) -> AsyncIterator[dict[str, Any]]:
    def chunk(index: int, delta: Delta, **more: Any) -> dict[str, Any]:
        choice = ChatDelta(index=index, delta=delta, **more)
        found = _chunk(ChatChunk(**about.fields, choices=[choice]), asked)
        found["choices"][0]["delta"] = delta.model_dump(exclude_none=True)
        return found

    for number in range(len(answers.all)):
        yield chunk(number, Delta(role="assistant", content=""))
    rows = []
    async for piece in answers.pieces():
        if piece.text or piece.tokens:
            logprobs = asked.chat_logprobs(piece.tokens)
            yield chunk(piece.index, Delta(content=piece.text), logprobs=logprobs)
        if piece.row is not None:
            rows.append(piece.row)
            yield chunk(piece.index, Delta(), finish_reason=piece.row.finish_reason)
    if asked.has_usage:
        yield ChatChunk(**about.fields, choices=[], usage=asked.usage(rows)).model_dump()


def _chunk(chunk: Completion | ChatChunk, asked: _Asked) -> dict[str, Any]:
    """Return an event, which has a usage of null only if the last one has the usage."""
    return chunk.model_dump(exclude=None if asked.has_usage else {"usage"})
