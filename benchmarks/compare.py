"""Compare systems by speed and memory: `python -m benchmarks.compare [--isa avx2] [--rounds 5]`.

The main model is a GPT-J with full width, few layers and random weights; `small` trains a model of
SmolLM2-135M's shape, LoRA on all linears, 8 rows of 40 tokens. Each system (`benchmarks.opponents`)
runs in its own process and environment with the same number of threads, and the systems take turns
with every single piece of work. Figures are tokens per second unless the row says otherwise, and
medians over rounds; ratios are medians of the ratios within a round. gptj8 and transformers have a
LoRA adapter of rank 8; systems that only generate have none.

parts:
  inference   decode at batch 1 and 8; prefill of 512 tokens, logits of all positions; peak memory
  training    full activation checkpointing, LoRA on the attention; peak memory
  small       the small model, without checkpointing
  loading     from the files to the first logits, with a warm page cache
  deviation   logits and adapter gradients against float32
  scaling     only if named: training with growing numbers of tokens, layers and threads

Prints Markdown and writes JSON after each piece of work. A system that fails is one line, and does
not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from benchmarks.comparison import Comparison
from benchmarks.opponents import INFERENCE, OPPONENTS, OUTPUTS, TRAINING
from benchmarks.opponents.client import Client, Failed, convert, last_line
from benchmarks.opponents.environments import NotInstalled, python_of
from benchmarks.opponents.isa import ISAS, environment, has_feature
from benchmarks.opponents.server import Options
from benchmarks.opponents.shapes import SIZES, Shape

PARTS = ("inference", "training", "small", "loading", "deviation", "scaling")
REFERENCES = {"the original weights": "float32", "the same 8-bit weights": "restored"}
PAUSE = 0.3  # seconds; some libraries' threads spin for 0.2 s after their work
# Tokens, layers and threads; only one of them varies per line.
SCALING = (
    *((tokens, 2, 2) for tokens in (32, 64, 128, 256, 512, 1024, 2048, 4096)),
    *((512, layers, 2) for layers in (4, 8, 28)),
    (512, 2, 1),
)


class Bench:
    """Starts systems and lets them take turns."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, found: Comparison) -> None:
        self.arguments, self.folder, self.found = arguments, folder, found
        self.methods: list[str] = arguments.methods

    @contextmanager
    def running(
        self, methods: Sequence[str], shape: Shape, threads: int | None = None, **settings: str
    ) -> Iterator[dict[str, Client]]:
        """Start systems one after the other, without those that fail, and stop them at the end."""
        clients: dict[str, Client] = {}
        try:
            for name in methods:
                try:
                    _log(f"starting {name}")
                    clients[name] = self._start(name, shape, threads, **settings)
                    self.found.about[name] = clients[name].about
                except (Failed, NotInstalled) as error:
                    self._note(f"{name} does not run: {error}")
            yield clients
        finally:
            for client in clients.values():
                client.close()

    def take_turns(self, clients: dict[str, Client], works: dict[str, tuple[str, int]]) -> None:
        """Measure each work (its name -> command and tokens) in rounds, each system in turn.

        A figure is tokens per second, or the answer itself if there are no tokens.
        """
        failed: set[tuple[str, str]] = set()
        for number in range(self.arguments.rounds):
            for work, (command, tokens) in works.items():
                for name, client in clients.items():
                    if (name, work) in failed:
                        continue
                    _log(f"round {number + 1}: {work}: {name}")
                    time.sleep(PAUSE)
                    try:
                        answer = client.ask(command, self._limit(name))
                        assert answer is not None
                        self.found.add(name, work, tokens / answer if tokens else answer)
                    except Failed as error:
                        self.found.add(name, work, f"fails: {error}")
                        failed.add((name, work))
                    self._save()

    def at_end(self, clients: dict[str, Client], work: str, command: str) -> None:
        """Add one answer of each system that still runs."""
        for name, client in clients.items():
            try:
                answer = client.ask(command, self._limit(name))
                assert answer is not None
                self.found.add(name, work, answer)
            except Failed:
                continue
        self._save()

    def that_can(self, work: str) -> list[str]:
        """Return the methods that can do a kind of work."""
        return [name for name in self.methods if work in OPPONENTS[name].works]

    def _start(self, name: str, shape: Shape, threads: int | None, **settings: str) -> Client:
        arguments = self.arguments
        threads = threads or arguments.threads
        python = python_of(name, arguments.isa)
        isa = "native" if OPPONENTS[name].unlimited else arguments.isa
        variables = environment(isa, threads, os.environ)
        place = f"{shape.architecture}-{shape.layers}"
        original = self.folder / place / "original"
        if OPPONENTS[name].needs_original and not original.is_dir():
            _save_original(shape, original)
        # Variants of one system share its files.
        module = OPPONENTS[name].module
        options = Options(
            name=name,
            shape=shape,
            original=original,
            folder=self.folder / place / module,
            dtype=OPPONENTS[name].dtype or self.found.dtype,
            threads=threads,
            **settings,
        )
        done = options.folder / "converted"
        if OPPONENTS[name].converts and not done.exists():
            _log(f"converting the weights for {name}")
            seconds = convert(python, options, variables, 10 * arguments.limit)
            if shape == arguments.shapes["main"]:
                self.found.add(name, "converting, seconds", seconds)
            done.touch()
        return Client(python, options, variables, self._limit(name))

    def _limit(self, name: str) -> float:
        return self.arguments.limit * OPPONENTS[name].patience

    def _note(self, note: str) -> None:
        if note not in self.found.notes:
            self.found.notes.append(note)
            _log(note)

    def _save(self) -> None:
        """Write after each measurement, so that an interrupted run keeps its results."""
        self.arguments.json.write_text(json.dumps(self.found.as_dict(), indent=2))


def inference(bench: Bench) -> None:
    prefill = bench.arguments.prefill
    works = {f"decode, batch {rows}": (f"decode {rows}", rows) for rows in (1, 8)}
    works[f"prefill, {prefill} tokens"] = (f"prefill {prefill}", prefill)
    with bench.running(bench.that_can(INFERENCE), bench.arguments.shapes["main"]) as clients:
        bench.take_turns(clients, works)
        bench.at_end(clients, "peak memory of inference, GiB", "memory")


def training(bench: Bench) -> None:
    works = {f"training, 1 x {n}": (f"train 1 {n}", n) for n in bench.arguments.tokens}
    with bench.running(bench.that_can(TRAINING), bench.arguments.shapes["main"]) as clients:
        bench.take_turns(clients, works)
        bench.at_end(clients, "peak memory of training, GiB", "memory")


def small(bench: Bench) -> None:
    settings = {"adapter": "all-linear", "checkpointing": "none"}
    shape = bench.arguments.shapes["small"]
    with bench.running(bench.that_can(TRAINING), shape, **settings) as clients:
        bench.take_turns(clients, {"training the small model, 8 x 40": ("train 8 40", 320)})
        bench.at_end(clients, "peak memory of training the small model, GiB", "memory")


def loading(bench: Bench) -> None:
    with bench.running(bench.methods, bench.arguments.shapes["main"]) as clients:
        bench.take_turns(clients, {"loading, seconds": ("load", 0)})


def deviation(bench: Bench) -> None:
    """Add relative L2 norms of differences; only gptj8 is also compared with its own weights."""
    import torch

    outputs: dict[str, dict[str, torch.Tensor]] = {}
    names = bench.that_can(OUTPUTS)
    for name in dict.fromkeys((*names, *REFERENCES.values())):
        with bench.running([name], bench.arguments.shapes["main"]) as clients:
            file = bench.folder / f"{name}.pt"
            try:
                for client in clients.values():
                    client.ask(f"outputs {file}", bench.arguments.limit)
                    outputs[name] = torch.load(file)
            except Failed as error:
                bench.found.add(name, "error of logits", f"fails: {error}")
    for name in names:
        for weights, reference in REFERENCES.items():
            is_own = weights == "the same 8-bit weights"
            if {name, reference} <= set(outputs) and (not is_own or name.startswith("gptj8")):
                for kind, wanted in outputs[reference].items():
                    error = float((outputs[name][kind] - wanted).norm() / wanted.norm())
                    bench.found.add(name, f"error of {kind}, to {weights} in float32", error)


def scaling(bench: Bench) -> None:
    for tokens, layers, threads in SCALING:
        shape = bench.arguments.shapes["main"]
        changed = Shape(**{**shape.as_dict(), "layers": layers, "positions": max(2048, tokens)})
        work = f"training, {tokens:,} tokens, {layers} layers, {threads} threads"
        with bench.running(bench.that_can(TRAINING), changed, threads) as clients:
            bench.take_turns(clients, {work: (f"train 1 {tokens}", tokens)})


def _save_original(shape: Shape, folder: Path) -> None:
    """Save the model that all systems start from, in a process whose memory is then free."""
    _log(f"saving a model of {shape.layers} layers with random weights")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / "original.txt"
    command = [sys.executable, "-m", "benchmarks.opponents.originals"]
    with open(log, "wb") as output:
        done = subprocess.run(
            [*command, json.dumps(shape.as_dict()), str(folder)], stdout=output, stderr=output
        )
    if done.returncode:
        sys.exit(f"error: the model cannot be saved: {last_line(log)}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe(dtype: str, isa: str, threads: int) -> Comparison:
    """Return an empty comparison for this machine; "auto" is what gptj8 picks with this ISA."""
    import torch

    from gptj8.model.loading import pick_arithmetic
    from gptj8.runtime.machine import cpu_name, device_name

    has = {name: value and has_feature(isa, name)
           for name, value in torch.cpu.get_capabilities().items()}  # fmt: skip
    with mock.patch("torch.cpu.get_capabilities", return_value=has):
        device, picked = pick_arithmetic(dtype)
    limited = "" if isa == "native" else f" limited to {isa}"
    name = cpu_name() if device.type == "cpu" else device_name(device.type)
    machine = f"{name}{limited}, {threads} threads"
    return Comparison(machine, str(picked).removeprefix("torch."))


def pick_methods(dtype: str) -> list[str]:
    """Return the systems to compare if none are named: those that may be the best here."""
    import torch

    plain = ["float32", "bfloat16"] if dtype == "bfloat16" else ["float32"]
    plain += ["float16"] if dtype == "float16" else []
    if torch.cuda.is_available():
        return ["gptj8", "gptj8-selective", *plain, "jit-bitsandbytes", "llm-int8", "nf4"]
    return ["gptj8", *plain, "ctranslate2", "openvino", "int8pack", "torchao", "llama.cpp"]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=OPPONENTS, metavar="NAME",
                        help="see `python -m benchmarks.opponents list`")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument("--isa", choices=ISAS, default="native")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=(128, 512), help="of training")
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=300, help="seconds for a piece of work")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny: to test this program")
    parser.add_argument("--json", type=Path, default=Path("reports/benchmarks/compare.json"))
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    shapes = SIZES[arguments.size]
    main_shape = Shape(**{**shapes["main"].as_dict(), "layers": arguments.layers})
    arguments.shapes = {**shapes, "main": main_shape}
    found = describe(arguments.dtype, arguments.isa, arguments.threads)
    arguments.methods = arguments.methods or pick_methods(found.dtype)
    for name in arguments.methods if arguments.isa != "native" else ():
        if reason := OPPONENTS[name].unlimited:
            found.notes.append(f"{name} could not be limited to {arguments.isa}: {reason}")
    measures: dict[str, Callable[[Bench], None]] = {
        "inference": inference, "training": training, "small": small,
        "loading": loading, "deviation": deviation, "scaling": scaling,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gptj8-compare-") as folder:
        bench = Bench(arguments, Path(folder), found)
        for part in arguments.parts:
            measures[part](bench)
    title = f"GPT-J of width {main_shape.width}, {arguments.layers} layers, random weights"
    print("\n".join(found.report(title)))


if __name__ == "__main__":
    main()
