"""One thread that owns the model: requests join its batch and leave it between two tokens.

A request is a future. Cancelling it, which is what a client that has gone away comes to, frees its
place before the next token. Classifications are answered between two steps, all that wait at once.
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
    """As many requests wait as may."""


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
    """Runs requests on a model, at most `max_batch` generations at a time.

    Args:
        predictor: whose model is the engine's thread's alone from here on.
        max_batch: rows generated together; more wait.
        max_waiting: requests that wait; one more is refused.
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
        """Ask for a continuation.

        Args:
            prompt: ids; with the new tokens within the model's context.
            on_token: called with each id as it is chosen, by the engine's thread.

        Raises:
            BusyError: if too many requests wait.
        """
        return self._submit(_Generation(prompt, sampling, on_token))

    def classify(self, prompt: Sequence[int]) -> Future[Any]:
        """Ask for the labels' probabilities, (labels,) float64, after a prompt.

        Raises:
            BusyError: if too many requests wait.
        """
        return self._submit(_Classification(prompt))

    @property
    def active(self) -> int:
        """How many rows are being generated."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """How many requests have not been begun."""
        return len(self._waiting)

    def close(self) -> None:
        """Cancel what is not finished and end the thread."""
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
                raise BusyError(f"{self.max_waiting} requests are waiting already; try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def _new_batch(self) -> GenerationBatch:
        encoder = self.predictor.encoder
        return GenerationBatch(self.predictor.model, encoder.vocab_size, encoder.eos_id)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    return
            try:
                self._classify_waiting()
                self._generate()
            except Exception as error:  # such as no memory to take a row out of the cache
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
        # Steps first: who is being answered does not wait longer for each one who comes.
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
        """A fault is the answer to those it concerns, and the log has its traceback."""
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
        """Take the first requests of a kind, as many as fit into one pass over their prompts."""
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
    except InvalidStateError:  # cancelled meanwhile
        pass
