"""Measurements of `benchmarks.compare`; each runs in its own process."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.methods import BASE, build, config, finish, load, training_loss
from gptj8.runtime.machine import peak_memory_gib, reset_peak_memory

PREFILL_TOKENS = 512
NEW_TOKENS = 24
DEVIATION_TOKENS = 64

Figures = dict[str, float | str]


class _Clock(BaseStreamer):
    """Record the time of each generated token; the first call passes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds_per_token(self) -> float:
        """Return the median time per token after the first, whose time includes the prompt."""
        times = self.times[1:]
        return statistics.median(b - a for a, b in itertools.pairwise(times))


def speed(
    method: str, layers: int, tokens: Sequence[int], trains_only: bool, device: torch.device
) -> Figures:
    """Return tokens per second for each kind of work, or the reason why it fails."""
    model: Any
    model, seconds = build(method, layers, device, positions=max(2048, *tokens))
    results: Figures = {} if method == BASE else {"conversion, seconds": seconds}
    reset_peak_memory()  # exclude the conversion, which holds two copies of the weights

    def attempt(name: str, count: int, work: Callable[[], object]) -> None:
        try:
            work()
            results[name] = count / statistics.median(_timed(work, device) for _ in range(3))
        except Exception as error:
            results[name] = f"fails: {type(error).__name__}"

    model.train()
    for length in tokens:
        ids = torch.randint(0, 50257, (1, length), device=device)

        def step(ids: torch.Tensor = ids) -> None:
            training_loss(method, model, ids).backward()
            model.zero_grad()

        attempt(f"training, {length} tokens", length, step)
    results["peak memory of training, GiB"] = peak_memory_gib()
    if trains_only:
        return results
    model.eval()
    with torch.inference_mode():
        ids = torch.randint(0, 50257, (1, PREFILL_TOKENS), device=device)
        attempt(f"prefill, {PREFILL_TOKENS} tokens", PREFILL_TOKENS, lambda: model(input_ids=ids))
        for batch, cache in ((1, None), (1, "static"), (8, None)):
            name = f"decode, batch {batch}" + (f", {cache} cache" if cache else "")
            try:
                results[name] = batch / _decode(model, batch, cache)
            except Exception as error:
                results[name] = f"fails: {type(error).__name__}"
    return results


def _timed(work: Callable[[], object], device: torch.device) -> float:
    finish(device)
    begun = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - begun


def _decode(model: Any, batch: int, cache: str | None) -> float:
    """Return seconds per token position of `generate`, for the complete batch."""
    prompts = torch.randint(0, 50257, (batch, 8), device=model.device)
    generate = functools.partial(
        model.generate,
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        use_cache=True,
        do_sample=False,
        pad_token_id=50256,
        cache_implementation=cache,
    )
    generate()
    measured = []
    for _ in range(3):
        clock = _Clock()
        generate(streamer=clock)
        measured.append(clock.seconds_per_token())
    return statistics.median(measured)


def deviation(method: str, layers: int, device: torch.device) -> Figures:
    """Return the error of logits and adapter gradients relative to float32 arithmetic.

    The error is the relative L2 norm of the difference. The reference uses the original weights.
    For gptj8, a second reference uses the restored 8-bit weights, which isolates the error of the
    arithmetic.
    """
    references = {"the original weights": "float32"}
    if method.startswith("gptj8"):
        references["the same 8-bit weights"] = "restored"
    found = _logits_and_gradients(method, layers, device)
    results: Figures = {}
    for weights, reference in references.items():
        wanted = _logits_and_gradients(reference, layers, device)
        for what, ours, theirs in zip(("logits", "gradients"), found, wanted, strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            results[f"error of {what}, to {weights} in float32"] = error
    return results


def _logits_and_gradients(
    method: str, layers: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    model: Any
    model, _ = build(method, layers, device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50257, (1, DEVIATION_TOKENS), generator=generator).to(device)
    model.train()
    training_loss(method, model, ids).backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float().flatten()
    return logits, torch.cat(gradients)


def save_original(folder: Path, layers: int) -> None:
    """Save the original model of all methods in bfloat16."""
    from transformers import GPTJForCausalLM

    model = GPTJForCausalLM(config(layers))
    model.to(torch.bfloat16).save_pretrained(folder)


def loading(method: str, original: Path, converted: Path, device: torch.device) -> Figures:
    """Return the seconds until the first logits, because mapped weights are read only then."""
    ids = torch.zeros((1, 8), dtype=torch.long, device=device)

    def work() -> None:
        model: Any = load(method, original, converted, device)
        with torch.no_grad():
            model(input_ids=ids)

    work()  # warm up: imports and the page cache
    return {"loading, seconds": statistics.median(_timed(work, device) for _ in range(3))}
