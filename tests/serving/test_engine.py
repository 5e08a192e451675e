"""The engine frees places in its batch, isolates errors and closes cleanly."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gptj8.model.generation.batch import GenerationBatch, cache_bytes_per_token
from gptj8.model.generation.sampling import Sampling
from gptj8.runtime.errors import UserError
from gptj8.serving.engine import BusyError, Engine, TooLargeError
from tests.helpers.served_models import greedy, held, until

LONG = Sampling(100)


@pytest.fixture
def predictor(predictors):
    return predictors["classification"]


@pytest.fixture
def make_engine(predictor):
    engines = []

    def make(**settings):
        engines.append(Engine(predictor, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_on_token_receives_tokens_in_order(make_engine, predictor):
    engine, tokens = make_engine(), []
    row = engine.generate([5, 6, 7], Sampling(20), lambda token, _: tokens.append(token)).result(20)
    assert tokens == row.ids == greedy(predictor, [5, 6, 7], 20)
    until(lambda: engine.active == 0)


def test_more_requests_than_places_give_sequential_results(make_engine, predictor):
    engine = make_engine(max_batch=3)
    prompts = [[5 + n, 6, 7][: 1 + n % 3] for n in range(20)]
    futures = [engine.generate(p, Sampling(5 + n % 7)) for n, p in enumerate(prompts)]
    labels = [engine.classify(prompt) for prompt in prompts]
    for n, (prompt, future) in enumerate(zip(prompts, futures, strict=True)):
        assert future.result(30).ids == greedy(predictor, prompt, 5 + n % 7)
    for prompt, future in zip(prompts, labels, strict=True):
        assert np.allclose(future.result(30), predictor.classify([prompt])[0], atol=1e-5)


def test_batch_has_at_most_max_batch_rows(make_engine, monkeypatch):
    engine = make_engine(max_batch=2)
    with held(engine, monkeypatch):
        futures = [engine.generate([5, 6], Sampling(5)) for _ in range(6)]
        until(lambda: engine.active == 2)
        assert engine.waiting >= 3
    assert [len(f.result(20).ids) for f in futures] == [5] * 6


def cache_bytes(predictor, rows, tokens):
    return rows * (tokens + 64) * cache_bytes_per_token(predictor.model)


def test_rows_wait_until_their_keys_and_values_fit(make_engine, predictor, monkeypatch):
    """With room for three rows of 60 tokens, or one of 100 beside nothing else."""
    engine = make_engine(max_batch=8, max_cache_bytes=cache_bytes(predictor, 3, 60))
    assert engine.max_cache_tokens == 3 * (60 + 64)
    used = []

    def watch(token, logprobs):
        used.append(engine.cache_tokens)

    candidates = [[5 + n, 6, 7, 8] for n in range(60)]
    answers = [(p, greedy(predictor, p, 56)) for p in candidates]
    prompts = [prompt for prompt, answer in answers if len(answer) == 56][:7]
    with held(engine, monkeypatch):
        with engine._changed:  # all at once
            futures = [engine.generate(prompt, Sampling(56), watch) for prompt in prompts]
        until(lambda: engine.active == 3)
        assert engine.waiting == 4
        large = engine.generate([5] * 20, Sampling(100), watch)
        small = engine.generate([5, 6], Sampling(2))  # does not overtake the large one
    for prompt, future in zip(prompts, futures, strict=True):
        assert future.result(60).ids == greedy(predictor, prompt, 56)
    assert large.result(60).ids == greedy(predictor, [5] * 20, 100)
    assert small.result(60).ids == greedy(predictor, [5, 6], 2)
    assert 3 * 60 < max(used) <= engine.max_cache_tokens
    until(lambda: engine.cache_tokens == 0)


def test_a_request_that_can_never_fit_is_refused(make_engine, predictor):
    engine = make_engine(max_cache_bytes=cache_bytes(predictor, 1, 60))
    assert len(engine.generate([5] * 10, Sampling(50)).result(20).ids) <= 50
    with pytest.raises(TooLargeError, match="61 tokens of prompt and answer do not fit into") as e:
        engine.generate([5] * 10, Sampling(51))
    assert "\n" not in str(e.value)
    assert "--cache-gib" in str(e.value)


def test_the_default_limit_is_half_of_the_free_memory(make_engine, predictor, monkeypatch):
    per_token = cache_bytes_per_token(predictor.model)
    monkeypatch.setattr("gptj8.serving.engine._free_bytes", lambda device: 2000 * per_token)
    assert make_engine(max_batch=8).max_cache_tokens == 1000
    monkeypatch.undo()  # this machine has room for all that can be used
    engine = make_engine(max_batch=2)
    assert engine.max_cache_tokens == 2 * (predictor.context + 64)
    assert engine.fits_context
    assert not make_engine(max_cache_bytes=cache_bytes(predictor, 1, 60)).fits_context


def test_unknown_free_memory_is_a_one_line_error(predictor, monkeypatch):
    def unknown(device):
        raise UserError("this system does not report free memory; add --memory, such as 8GB")

    monkeypatch.setattr("gptj8.serving.engine.available_bytes", unknown)
    with pytest.raises(UserError, match="does not report free memory; set --cache-gib"):
        Engine(predictor)
    Engine(predictor, max_cache_bytes=1 << 20).close()


def test_a_callback_can_end_a_row(make_engine, predictor):
    engine, tokens = make_engine(), []

    def until_third(token, logprobs):
        tokens.append(token)
        return len(tokens) == 3

    other = engine.generate([7, 8], Sampling(30))
    row = engine.generate([5, 6, 7], Sampling(20), until_third).result(20)
    assert (row.ids, row.finish_reason) == (greedy(predictor, [5, 6, 7], 20)[:3], "stop")
    assert other.result(20).ids == greedy(predictor, [7, 8], 30)
    until(lambda: engine.active == 0)
    assert engine._batch.rows == []


def test_cancelled_row_frees_its_place(make_engine, predictor, monkeypatch):
    engine = make_engine(max_batch=1)
    with held(engine, monkeypatch):
        first = engine.generate([5, 6], LONG)
        second = engine.generate([7, 8], Sampling(3))
        until(lambda: engine.active == 1)
        assert first.cancel()
    assert second.result(20).ids == greedy(predictor, [7, 8], 3)
    assert engine._batch.rows == []


def test_cancelled_request_frees_its_place_in_queue(make_engine, monkeypatch):
    engine = make_engine(max_batch=1, max_waiting=2)
    with held(engine, monkeypatch):
        active = engine.generate([5, 6], Sampling(3))
        until(lambda: engine.active == 1)
        waiting = [engine.generate([5, 6], Sampling(3)) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are already waiting"):
            engine.generate([5, 6], Sampling(3))
        with pytest.raises(BusyError):
            engine.classify([5, 6])
        waiting[0].cancel()
        last = engine.classify([5, 6])
    assert len(last.result(20)) == 3
    assert active.result(20).ids == waiting[1].result(20).ids


def test_error_in_step_is_raised_and_next_request_works(make_engine, predictor, monkeypatch, capfd):
    engine = make_engine()

    def fail(self):
        if self.rows:
            raise RuntimeError("step failed")
        return []

    with monkeypatch.context() as broken:
        broken.setattr(GenerationBatch, "step", fail)
        futures = [engine.generate([5, 6], LONG) for _ in range(2)]
        for future in futures:
            with pytest.raises(RuntimeError, match="step failed"):
                future.result(20)
    assert engine.active == 0
    assert "step failed" in capfd.readouterr().err
    assert engine.generate([5, 6], Sampling(4)).result(20).ids == greedy(predictor, [5, 6], 4)


def test_error_of_one_request_does_not_affect_others(make_engine, predictor, monkeypatch, capfd):
    """Errors in adding a prompt, in a classification and in the token callback."""
    engine = make_engine()
    bad = [9, 9]
    add, classify = GenerationBatch.add, predictor.classify

    def add_all_but_one(self, prompts, samplings):
        if bad in prompts:
            raise MemoryError("of the prompt")
        return add(self, prompts, samplings)

    def fail(prompts):
        raise MemoryError("of the classification")

    def fail_at_third_token(token, logprobs, seen=[]):  # noqa: B006
        seen.append(token)
        if len(seen) == 3:
            raise LookupError("of the token")

    monkeypatch.setattr(GenerationBatch, "add", add_all_but_one)
    monkeypatch.setattr(predictor, "classify", fail)
    begun = threading.Event()
    good = engine.generate([5, 6], LONG, lambda *_: begun.set())
    assert begun.wait(20)
    with pytest.raises(LookupError, match="of the token"):
        engine.generate([5, 6], LONG, fail_at_third_token).result(20)
    with pytest.raises(MemoryError, match="of the prompt"):
        engine.generate(bad, LONG).result(20)
    with pytest.raises(MemoryError, match="of the classification"):
        engine.classify([5, 6]).result(20)
    assert good.result(20).ids == greedy(predictor, [5, 6], 100)
    until(lambda: engine.active == 0)
    monkeypatch.setattr(predictor, "classify", classify)
    assert len(engine.classify([5, 6]).result(20)) == 3


def test_close_cancels_unfinished_requests(make_engine, monkeypatch):
    engine = make_engine(max_batch=1)
    with held(engine, monkeypatch) as gate:
        active = engine.generate([5, 6], LONG)
        until(lambda: engine.active == 1)
        waiting = engine.generate([5, 6], LONG)
        closing = threading.Thread(target=engine.close)
        closing.start()
        until(lambda: engine._closed)
        gate.set()
        closing.join(20)
    assert active.cancelled()
    assert waiting.cancelled()
    assert not engine._thread.is_alive()
    with pytest.raises(BusyError, match="shutting down"):
        engine.generate([5, 6], LONG)
    engine.close()  # a second call has no effect


@pytest.mark.parametrize("leaving", ["cancelled", "finished"])
def test_out_of_memory_while_removing_a_row(make_engine, predictor, monkeypatch, leaving):
    """Removing a row copies the cache of the others, which can run out of memory."""
    engine = make_engine()
    begun = threading.Event()
    other = engine.generate([5, 6, 7], LONG, lambda *_: begun.set())
    assert begun.wait(20)

    def no_memory(layer, rows, columns):
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr("gptj8.model.generation.batch._GrowingLayer.select", no_memory)
        future = engine.generate([8, 9], Sampling(2 if leaving == "finished" else 90))
        if leaving == "cancelled":
            until(lambda: engine.active == 2 or other.done())
            future.cancel()
        until(lambda: other.done() and future.done())
    until(lambda: engine.active == 0)
    again = engine.generate([5, 6, 7], Sampling(8)).result(20)
    assert again.ids == greedy(predictor, [5, 6, 7], 8)
