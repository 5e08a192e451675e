"""Continuous batching: one thread owns the model, and requests join and leave between tokens.

A request is a future. Cancelling the future, which happens when its client disconnects, frees its
place in the batch before the next token. All waiting classifications are run together between two
generation steps.

The memory of keys and values is bounded: a request joins the batch only if all its rows fit until
they are finished, with the padding to the longest. Requests join in the order in which they came,
so a large one is never overtaken for good. While new rows join, the keys and values of their
prompts exist twice.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from gptj8.model.generation.batch import (
    GeneratedRow,
    GenerationBatch,
    cache_bytes_per_token,
    cache_tokens_needed,
)
from gptj8.model.generation.sampling import Sampling, TokenLogprobs
from gptj8.model.scoring.batching import max_batch_tokens
from gptj8.runtime.errors import UserError
from gptj8.runtime.machine import available_bytes, memory_gib
from gptj8.serving.predictor import Predictor

OnToken = Callable[[int, TokenLogprobs | None], bool | None]
_SHARE_OF_MEMORY = 0.5  # of the free memory; the rest is for activations and other programs


class BusyError(Exception):
    """The queue is full."""


class ClosedError(BusyError):
    """The engine is closed."""


class TooLargeError(ValueError):
    """A request needs more keys and values than there may ever be."""


@dataclass(eq=False)
class _Generation:
    prompt: Sequence[int]
    sampling: Sampling
    on_token: OnToken
    future: Future = field(default_factory=Future)
    row: GeneratedRow | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt and the complete answer."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclass(eq=False)
class _Classification:
    prompt: Sequence[int]
    future: Future = field(default_factory=Future)


class Engine:
    """Run requests on a model, with at most `max_batch` generations per batch.

    Args:
        predictor: predictor whose model must from now on be used only by the engine's thread.
        max_batch: maximum number of rows that are generated together; others wait.
        max_waiting: maximum number of waiting requests; others are rejected.
        max_cache_bytes: maximum memory of the batch's keys and values; None: half of the memory
            that is free now.

    Attributes:
        max_cache_tokens: maximum number of tokens whose keys and values are kept, with padding.

    Raises:
        UserError: if `max_cache_bytes` is None and the free memory is unknown.
    """

    def __init__(
        self,
        predictor: Predictor,
        max_batch: int = 8,
        max_waiting: int = 256,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.predictor = predictor
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        if max_cache_bytes is None:
            max_cache_bytes = int(_SHARE_OF_MEMORY * _free_bytes(predictor.model.device.type))
        largest = cache_tokens_needed(max_batch, predictor.context)
        self.bytes_per_token = cache_bytes_per_token(predictor.model)
        self.max_cache_tokens = min(largest, max_cache_bytes // self.bytes_per_token)
        self._active: list[_Generation] = []
        self._waiting: deque[_Generation | _Classification] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batch = self._new_batch()
        self._thread = threading.Thread(target=self._run, name="gptj8-engine", daemon=True)
        self._thread.start()

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        on_token: OnToken = lambda token, logprobs: None,
    ) -> Future[GeneratedRow]:
        """Queue a generation and return the future of its row.

        Args:
            prompt: token ids; together with the new tokens they must fit into the model's context.
            sampling: sampling settings, including the number of new tokens.
            on_token: called by the engine's thread with each new token id and, if the settings ask
                for them, its log probabilities. If it returns True, the row is finished.

        Raises:
            BusyError: if too many requests are waiting, or the engine is closed.
            TooLargeError: if the request would not even fit alone.
        """
        request = _Generation(prompt, sampling, on_token)
        if not self._fits([request]):
            room = self.max_cache_tokens * self.bytes_per_token / 2**30
            raise TooLargeError(
                f"{request.tokens} tokens of prompt and answer do not fit into the {room:.3g} GiB "
                "for keys and values; send a shorter prompt, ask for fewer tokens, or start the "
                "server with a larger --cache-gib"
            )
        return self._submit(request)

    def classify(self, prompt: Sequence[int]) -> Future[Any]:
        """Queue a classification and return the future of the label probabilities.

        The probabilities are a float64 array of shape (labels,).

        Raises:
            BusyError: if too many requests are waiting, or the engine is closed.
        """
        return self._submit(_Classification(prompt))

    @property
    def active(self) -> int:
        """Number of rows that are being generated."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of requests that have not started."""
        return len(self._waiting)

    @property
    def fits_context(self) -> bool:
        """Whether a request that needs the whole context fits."""
        return cache_tokens_needed(1, self.predictor.context) <= self.max_cache_tokens

    @property
    def cache_tokens(self) -> int:
        """Number of tokens whose keys and values have memory now, with padding."""
        return self._batch.cache_tokens

    def close(self) -> None:
        """Stop the thread and cancel unfinished requests."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for request in (*self._active, *self._waiting):
            request.future.cancel()

    def _submit(self, request: Any) -> Future:
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) >= self.max_waiting:
                self._forget_cancelled()
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests are already waiting; try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def _new_batch(self) -> GenerationBatch:
        predictor = self.predictor
        return GenerationBatch(predictor.model, predictor.encoder.vocab_size, predictor.end_ids)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    return
            try:
                self._classify_waiting()
                self._generate()
            except Exception as error:  # for example out of memory while removing a cache row
                active, self._active = self._active, []
                self._batch = self._new_batch()
                self._fail(active, error)

    def _classify_waiting(self) -> None:
        requests = self._take(_Classification, self.max_waiting)
        if not requests:
            return
        try:
            probabilities = self.predictor.classify([request.prompt for request in requests])
        except Exception as error:
            self._fail(requests, error)
            return
        for request, row in zip(requests, probabilities, strict=True):
            _answer(request.future, row)

    def _generate(self) -> None:
        for request in [r for r in self._active if r.future.cancelled()]:
            self._leave(request)
        # Step before adding rows, so that new requests do not delay active ones.
        try:
            advanced = self._batch.step()
        except Exception as error:
            self._batch = self._new_batch()
            self._fail(self._active, error)
            advanced = []
        for row in advanced:
            self._report(next(r for r in self._active if r.row is row))
        if added := self._take(_Generation, self.max_batch - len(self._active)):
            self._begin(added)

    def _begin(self, added: Sequence[_Generation]) -> None:
        self._active += added
        try:
            rows = self._batch.add([r.prompt for r in added], [r.sampling for r in added])
        except Exception as error:
            kept = self._batch.rows
            self._fail([r for r in self._active if r.row not in kept], error)
            return
        for request, row in zip(added, rows, strict=True):
            request.row = row
        for request in added:
            self._report(request)

    def _report(self, request: _Generation) -> None:
        row = request.row
        assert row is not None
        try:
            is_enough = row.finish_reason != "stop" and request.on_token(
                row.ids[-1], row.last_logprobs
            )
        except Exception as error:
            self._fail([request], error)
            return
        if is_enough:
            row.finish_reason = "stop"
        if row.finish_reason is not None:
            try:
                self._leave(request)
            finally:
                _answer(request.future, row)

    def _fail(self, requests: Sequence[Any], error: Exception) -> None:
        """Set the error as the result of the affected requests and log its traceback."""
        traceback.print_exception(error, file=sys.stderr)
        for request in list(requests):
            self._leave(request)
            _answer(request.future, error)

    def _leave(self, request: Any) -> None:
        if request in self._active:
            self._active.remove(request)
            if request.row is not None:
                self._batch.remove(request.row)

    def _take(self, kind: type, count: int) -> list[Any]:
        """Dequeue the first requests of a kind that fit into one forward pass and into memory."""
        budget = max_batch_tokens(self.predictor.model.device, 1)
        taken: list[Any] = []
        with self._changed:
            self._forget_cancelled()
            for request in list(self._waiting):
                if isinstance(request, kind):
                    longest = max([len(r.prompt) for r in (*taken, request)])
                    fits = longest * (len(taken) + 1) <= budget or not taken
                    if isinstance(request, _Generation):
                        fits = fits and self._fits([*self._active, *taken, request])
                    if len(taken) >= count or not fits:
                        break
                    self._waiting.remove(request)
                    taken.append(request)
        return taken

    def _fits(self, together: Sequence[_Generation]) -> bool:
        longest = max(request.tokens for request in together)
        return cache_tokens_needed(len(together), longest) <= self.max_cache_tokens

    def _forget_cancelled(self) -> None:
        self._waiting = deque(r for r in self._waiting if not r.future.cancelled())


def _free_bytes(device: str) -> int:
    try:
        available = available_bytes("cuda" if device == "cuda" else "cpu")
    except UserError:
        reason = "this system does not report free memory; set --cache-gib"
        raise UserError(reason) from None
    return max(0, available - int(memory_gib() * 2**30))


def _answer(future: Future, outcome: Any) -> None:
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:  # the request was cancelled meanwhile
        pass
