"""Measure latency and throughput of `gptj8 serve` under concurrent requests.

python -m benchmarks.serving [--requests 200] [--dtype float32]    after `make repro`

Starts its own servers on loopback: the fine-tuned model for /classify, and its base for /generate,
because a model fine-tuned for labels stops after one label. Every response is compared with the
model's answer to the same request alone, and the server's memory is read before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pandas as pd

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.runtime.process import run
from gptj8.serving.predictor import Predictor

BASE, EXPORT, DATASET = "artifacts/base-8bit", "artifacts/export", "artifacts/dataset"
NEW_TOKENS = 32


def main() -> None:
    """Run all loads and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    texts = _texts(given.requests)
    print("| request | concurrency | answered | equal | p50 s | p95 s | per second | memory MB |")
    print("|---|---|---|---|---|---|---|---|")
    for request, export in (("classify", EXPORT), ("generate", None)):
        expected = _single_answers(Predictor.load(BASE, export, given.dtype), request, texts)
        port = _free_port()
        command = [sys.executable, "-m", "gptj8.commands.main", "serve", "--port", str(port)]
        command += ["--adapter", export or "none", "--dtype", given.dtype]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
            try:
                asyncio.run(_measure(request, port, server.pid, texts, expected))
            finally:
                server.terminate()


def _texts(count: int) -> list[str]:
    texts = load_prepared(DATASET).split("test")["text"].tolist()
    return [texts[index % len(texts)] for index in range(count)]


def _single_answers(predictor: Predictor, request: str, texts: list[str]) -> dict[str, str]:
    """Return the answer to each text without other requests."""
    from gptj8.model.generation.batch import generate_greedily

    answers = {}
    encoder = predictor.encoder
    for text in set(texts):
        if request == "classify":
            prompt = predictor.encode_for_labels({"text": text}).ids
            answers[text] = predictor.labels[predictor.classify([prompt])[0].argmax()]
            continue
        (ids,) = generate_greedily(
            predictor.model,
            [predictor.encode_prompt(_prose(text))],
            max_new_tokens=NEW_TOKENS,
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
        )
        answers[text] = encoder.decode(ids)
    return answers


def _prose(text: str) -> str:
    return " ".join(text.split()[:12])


async def _measure(
    request: str, port: int, pid: int, texts: list[str], expected: dict[str, str]
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        await _until_ready(session)

        async def classify(text: str) -> tuple[str, int]:
            answer = await _post(session, "/classify", {"row": {"text": text}})
            return answer["label"], 1

        async def generate(text: str) -> tuple[str, int]:
            body = {"prompt": _prose(text), "max_new_tokens": NEW_TOKENS}
            answer = await _post(session, "/generate", body)
            return answer["completion"], answer["new_tokens"]

        ask, unit = (classify, "rows") if request == "classify" else (generate, "tokens")
        await _load(ask, texts, len(texts))  # warm up: one-time allocations
        for concurrency in (1, 8, len(texts)):
            asked = texts if concurrency > 1 else texts[: max(1, len(texts) // 4)]
            before = _resident_mb(pid)
            took, seconds, answers, work = await _load(ask, asked, concurrency)
            pairs = zip(asked, answers, strict=True)
            same = sum(answer == expected[text] for text, answer in pairs)
            print(
                f"| {request} | {concurrency} | {len(answers)} of {len(asked)} | {same} "
                f"| {statistics.median(took):.3f} | {_percentile(took, 0.95):.3f} "
                f"| {work / seconds:.0f} {unit} | {before:.0f} to {_resident_mb(pid):.0f} |",
                flush=True,
            )


async def _load(
    ask: Callable[[str], Awaitable[tuple[str, int]]], texts: list[str], concurrency: int
) -> tuple[list[float], float, list[str], int]:
    """Return the seconds per request, total seconds, answers, and total rows or tokens."""
    gate = asyncio.Semaphore(concurrency)

    async def one(text: str) -> tuple[float, str, int]:
        async with gate:
            started = time.perf_counter()
            answer, work = await ask(text)
            return time.perf_counter() - started, answer, work

    started = time.perf_counter()
    results = await asyncio.gather(*map(one, texts))
    seconds = time.perf_counter() - started
    took, answers, work = zip(*results, strict=True)
    return list(took), seconds, list(answers), sum(work)


async def _post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as response:
        content = await response.text()
        if response.status != 200:
            raise RuntimeError(f"{path} returned status {response.status}: {content}")
        return json.loads(content)


async def _until_ready(session: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with session.get("/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)
    raise RuntimeError("the server does not respond")


def _percentile(values: list[float], share: float) -> float:
    return float(pd.Series(values).quantile(share))


def _resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1000


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    run(main)
