"""Continuous batching: one thread owns the model, and requests join and leave between tokens.

A request is a future. Cancelling the future, which happens when its client disconnects, frees its
place in the batch before the next token. All waiting classifications are run together between two
generation steps.
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

from gptj8.model.generation.batch import GeneratedRow, GenerationBatch, Sampling
from gptj8.model.scoring.batching import max_batch_tokens
from gptj8.serving.predictor import Predictor


class BusyError(Exception):
    """The queue is full, or the engine is closed."""


@dataclass(eq=False)
class _Generation:
    prompt: Sequence[int]
    sampling: Sampling
    on_token: Callable[[int], None]
    future: Future = field(default_factory=Future)
    row: GeneratedRow | None = None


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
    """

    def __init__(self, predictor: Predictor, max_batch: int = 8, max_waiting: int = 256) -> None:
        self.predictor = predictor
        self.max_batch = max_batch
        self.max_waiting = max_waiting
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
        on_token: Callable[[int], None] = lambda token: None,
    ) -> Future[GeneratedRow]:
        """Queue a generation and return the future of its row.

        Args:
            prompt: token ids; together with the new tokens they must fit into the model's context.
            sampling: sampling settings, including the number of new tokens.
            on_token: called by the engine's thread with each new token id.

        Raises:
            BusyError: if too many requests are waiting, or the engine is closed.
        """
        return self._submit(_Generation(prompt, sampling, on_token))

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
                raise BusyError("the server is shutting down")
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
            if row.finish_reason != "stop":
                request.on_token(row.ids[-1])
        except Exception as error:
            self._fail([request], error)
            return
        if row.finish_reason is not None:
            self._leave(request)
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
        """Dequeue the first requests of a kind whose prompts fit into one forward pass."""
        budget = max_batch_tokens(self.predictor.model.device, 1)
        taken: list[Any] = []
        with self._changed:
            self._forget_cancelled()
            for request in list(self._waiting):
                if isinstance(request, kind):
                    longest = max([len(r.prompt) for r in (*taken, request)])
                    fits = longest * (len(taken) + 1) <= budget or not taken
                    if len(taken) >= count or not fits:
                        break
                    self._waiting.remove(request)
                    taken.append(request)
        return taken

    def _forget_cancelled(self) -> None:
        self._waiting = deque(r for r in self._waiting if not r.future.cancelled())


def _answer(future: Future, outcome: Any) -> None:
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:  # the request was cancelled meanwhile
        pass
