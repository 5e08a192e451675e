"""The answers to one request, on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import StreamingResponse

from gptj8.model.generation.batch import GeneratedRow
from gptj8.model.generation.sampling import Sampling, TokenLogprobs
from gptj8.runtime.errors import UserError
from gptj8.serving.engine import BusyError, ClosedError, Engine, TooLargeError
from gptj8.serving.meters import Meters
from gptj8.serving.predictor import AnswerStream
from gptj8.serving.problems import OPENAI, RejectedError, problem_body
from gptj8.serving.stop_strings import StopStrings

_CLOSED = "the server is shutting down"


class AnswerToken(NamedTuple):
    """A token of an answer, with log probabilities.

    Attributes:
        id: the token.
        offset: number of characters of the answer before it.
        logprobs: log probabilities where it was chosen.
    """

    id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass
class Piece:
    """A piece of an answer.

    Attributes:
        index: number of the answer.
        text: text that continues the answer.
        tokens: its tokens, if log probabilities were asked for.
        row: the generated row, in the last piece of an answer.
    """

    index: int
    text: str
    tokens: list[AnswerToken] = field(default_factory=list)
    row: GeneratedRow | None = None


class Answer:
    """The text of one answer, put together in the engine's thread.

    Args:
        index: number of the answer.
        stream: decodes the tokens.
        stop: stop strings; the answer ends before the first of them.
        deliver: called with each piece, and with the failed or cancelled future of an answer.

    Attributes:
        text: text that can be shown.
        tokens: the tokens of that text, if log probabilities were asked for.
    """

    def __init__(
        self,
        index: int,
        stream: AnswerStream,
        stop: Sequence[str],
        deliver: Callable[[Piece | Future], None],
    ) -> None:
        self.text = ""
        self.tokens: list[AnswerToken] = []
        self._index = index
        self._stream = stream
        self._stop = StopStrings(stop)
        self._deliver = deliver
        self._pending: list[AnswerToken] = []

    def put(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Add a token and return whether a stop string ends the answer."""
        if logprobs is not None:
            self._pending.append(AnswerToken(token, len(self._stream.text), logprobs))
        piece = self._show(self._stop.put(self._stream.put(token)))
        if piece.text or piece.tokens:
            self._deliver(piece)
        return self._stop.is_found

    def end(self, future: Future) -> None:
        """Deliver the last piece, or the future if there is no answer."""
        if future.cancelled() or future.exception():
            self._deliver(future)
            return
        piece = self._show(self._stop.end())
        if not self._stop.is_found:  # tokens without text, such as half a character
            self.tokens += self._pending
            piece.tokens += self._pending
        piece.row = future.result()
        self._deliver(piece)

    def _show(self, text: str) -> Piece:
        self.text += text
        shown = [token for token in self._pending if token.offset < len(self.text)]
        self._pending = self._pending[len(shown) :]
        self.tokens += shown
        return Piece(self._index, text, shown)


class Answers:
    """The answers to one request.

    Args:
        engine: engine that runs the request.
        seconds: timeout of the request.
        meters: the server's measurements.
    """

    def __init__(self, engine: Engine, seconds: float, meters: Meters) -> None:
        self.all: list[Answer] = []
        self._engine = engine
        self._seconds = seconds
        self._meters = meters
        self._futures: list[Future[GeneratedRow]] = []
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Future] = asyncio.Queue()

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        stop: Sequence[str] = (),
        of_row: bool = False,
    ) -> None:
        """Add an answer to a prompt; see `Engine.generate`.

        Args:
            prompt: token ids.
            sampling: sampling settings.
            stop: stop strings.
            of_row: whether the prompt is that of a row; see `AnswerStream`.

        Raises:
            RejectedError: if the engine does not accept it.
        """
        stream = AnswerStream(self._engine.predictor.encoder, prompt, of_row)
        answer = Answer(len(self.all), stream, stop, self._deliver)
        measured = self._meters.answer(len(prompt))

        def on_token(token: int, logprobs: TokenLogprobs | None) -> bool:
            measured()
            return answer.put(token, logprobs)

        try:
            future = submitted(self._engine.generate, prompt, sampling, on_token)
        except RejectedError:
            self.cancel()
            raise
        future.add_done_callback(answer.end)
        self.all.append(answer)
        self._futures.append(future)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of all answers as they come.

        Raises:
            RejectedError: if an answer fails or takes too long.
        """
        end = time.monotonic() + self._seconds
        unfinished = len(self.all)
        while unfinished:
            try:
                piece = await asyncio.wait_for(self._pieces.get(), end - time.monotonic())
            except TimeoutError:
                raise _timed_out(self._seconds) from None
            if isinstance(piece, Future):
                raise _failure(piece)
            unfinished -= piece.row is not None
            yield piece

    async def rows(self, request: Request) -> list[GeneratedRow]:
        """Wait for all answers and return their rows; see `outcomes`."""
        return await outcomes(request, self._futures, self._seconds)

    def cancel(self) -> None:
        """Cancel all answers that are not finished."""
        for future in self._futures:
            future.cancel()

    def _deliver(self, piece: Piece | Future) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class EventStream(StreamingResponse):
    """Server-sent events; cancels the answers when the response ends for any reason.

    The event generator cannot do this, because it never starts if the client disconnects first.
    """

    media_type = "text/event-stream"

    def __init__(
        self, path: str, contents: AsyncIterator[dict[str, Any]], answers: Answers
    ) -> None:
        events = _events(path, contents)
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._answers = answers

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self._answers.cancel()


def submitted(submit: Any, *arguments: Any) -> Future:
    """Return the future of a request to the engine.

    Raises:
        RejectedError: if the engine does not accept it.
    """
    try:
        return submit(*arguments)
    except TooLargeError as error:
        raise RejectedError(422, str(error), code="context_length_exceeded") from error
    except ClosedError as error:
        raise RejectedError(503, str(error)) from error
    except BusyError as error:
        raise RejectedError(429, str(error)) from error


async def outcomes(request: Request, futures: Sequence[Future], seconds: float) -> list[Any]:
    """Wait for the engine's results.

    Raises:
        RejectedError: if the client disconnects, the request times out, the engine is closed or
            the model fails.
    """
    done = [asyncio.wrap_future(future) for future in futures]
    all_done = asyncio.ensure_future(asyncio.wait(done, return_when=asyncio.FIRST_EXCEPTION))
    gone = asyncio.ensure_future(request.receive())  # after the body comes only the disconnect
    try:
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait({all_done, gone}, timeout=seconds, return_when=first)
    finally:
        gone.cancel()
        all_done.cancel()
        for future in futures:
            future.cancel()
    failed = next((f for f in futures if f.done() and not f.cancelled() and f.exception()), None)
    if failed is not None:
        raise _failure(failed)
    if not all_done.done() or all_done.cancelled():
        if gone.done() and not gone.cancelled():
            raise RejectedError(499, "the client disconnected")
        raise _timed_out(seconds)
    if any(future.cancelled() for future in futures):
        raise RejectedError(503, _CLOSED)
    return [future.result() for future in futures]


async def _events(path: str, contents: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for content in contents:
            yield _event(json.dumps(content))  # ASCII: some clients split lines at U+2028
    except RejectedError as error:
        yield _event(json.dumps(problem_body(path, error)))
        return
    if path.startswith(OPENAI):
        yield _event("[DONE]")


def _event(content: str) -> str:
    return f"data: {content}\n\n"


def _timed_out(seconds: float) -> RejectedError:
    return RejectedError(504, f"timed out after {seconds:g} s")


def _failure(future: Future) -> RejectedError:
    """Return the reason for which a future has no result."""
    if future.cancelled():
        return RejectedError(503, _CLOSED)
    error = future.exception()
    known = isinstance(error, UserError)
    return RejectedError(500, str(error) if known else f"the model failed: {type(error).__name__}")
