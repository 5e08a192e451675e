"""The process of one system: `python -m benchmarks.opponents.server OPTIONS`, OPTIONS as JSON.

It loads the model, answers {"ready": true, ...}, and then measures one piece of work per line of
standard input. Each answer is one line of JSON, with "value" or "error":

train ROWS TOKENS   seconds of a training step
prefill TOKENS      seconds to the logits of all positions of one sequence
decode ROWS         seconds per position of greedy generation, the median of a run
load                seconds from the files to the first logits; the first load warms up
memory              peak memory of the process in GiB
outputs FILE        writes logits and gradients to a file

The first time that a piece of work is asked for, it is also done once untimed. Only this module and
`shapes` are imported in every environment, so they need the standard library alone.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.opponents import OPPONENTS
from benchmarks.opponents.shapes import Shape

PROMPT_TOKENS, NEW_TOKENS = 8, 24


@dataclass(frozen=True)
class Options:
    """What a system is started with.

    Attributes:
        name: its name in `OPPONENTS`.
        shape: sizes of the model.
        original: folder with the model in bfloat16 and a tokenizer.
        folder: the system's own folder, for the model in its format.
        dtype: dtype to compute in, where the system has a choice.
        threads: number of threads.
        adapter: what LoRA adapts, "attention" or "all-linear".
        checkpointing: activation checkpointing in training, "full" or "none".
    """

    name: str
    shape: Shape
    original: Path
    folder: Path
    dtype: str = "float32"
    threads: int = 2
    adapter: str = "attention"
    checkpointing: str = "full"

    def to_json(self) -> str:
        """Return the options as JSON, for `from_json` in another process."""
        paths = {"original": str(self.original), "folder": str(self.folder)}
        return json.dumps({**vars(self), **paths, "shape": self.shape.as_dict()})

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Return the options that `to_json` wrote."""
        found = json.loads(text)
        paths = {name: Path(found[name]) for name in ("original", "folder")}
        return cls(**{**found, **paths, "shape": Shape(**found["shape"])})


class System:
    """A system to measure; subclasses override what they can do."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def convert(self) -> None:
        """Write the model to `options.folder` in the system's own format."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the model and compute the first logits."""
        raise NotImplementedError

    def unload(self) -> None:
        """Forget the model."""

    def about(self) -> dict[str, str]:
        """Return versions, and what the system says about the ISA it uses."""
        return {}

    def train(self, rows: int, tokens: int) -> None:
        """Do the work of a training step."""
        raise NotImplementedError

    def prefill(self, tokens: int) -> None:
        """Compute the logits of all positions of one sequence."""
        raise NotImplementedError

    def decode(self, rows: int) -> float:
        """Return the seconds per position of greedy generation from prompts of a few tokens."""
        raise NotImplementedError

    def outputs(self, file: Path) -> None:
        """Write logits and gradients of a fixed sequence."""
        raise NotImplementedError

    def memory(self) -> float:
        """Return the peak memory in GiB."""
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(x for x in status if x.startswith("VmHWM:")).split()[1]) / 2**20

    def sequences(self, rows: int, tokens: int) -> list[list[int]]:
        """Return random token ids, always the same."""
        draw = random.Random(rows * tokens)
        return [[draw.randrange(1, self.options.shape.vocabulary) for _ in range(tokens)]
                for _ in range(rows)]  # fmt: skip


def seconds_per_position(times: Sequence[float]) -> float:
    """Return the median difference of the times at which tokens were known."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


class Server:
    """Answers commands by measuring a system."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._warm: set[str] = set()

    def answer(self, line: str) -> dict[str, Any]:
        """Return the answer to one command; a failure of the system is an answer too."""
        try:
            return {"value": self._measure(line.rstrip("\n"))}
        except NotImplementedError:
            return {"error": "not supported"}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return {"error": f"{type(error).__name__}: {lines[0]}"[:200]}

    def _measure(self, line: str) -> float | None:
        word, _, rest = line.partition(" ")
        if word == "outputs":
            self.system.outputs(Path(rest))
            return None
        if word == "memory":
            return self.system.memory()
        if word == "load":
            self.system.unload()
            gc.collect()
            return _timed(self.system.load)
        if word not in ("train", "prefill", "decode"):
            raise ValueError(f"unknown command {line!r}")
        numbers = [int(number) for number in rest.split()]
        work: Callable[..., float | None] = getattr(self.system, word)
        if line not in self._warm:
            work(*numbers)
            self._warm.add(line)
        if word == "decode":
            return work(*numbers)
        return _timed(lambda: work(*numbers))


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def serve(server: Server, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until there are no more."""
    for line in commands:
        print(json.dumps(server.answer(line)), file=answers, flush=True)


def create(options: Options) -> System:
    """Import a system's module and create the system."""
    module = importlib.import_module(f"benchmarks.opponents.{OPPONENTS[options.name].module}")
    return module.create(options)


def main() -> None:
    """Convert the model, or serve it."""
    text, *rest = sys.argv[1:]
    options = Options.from_json(text)
    # Libraries print to standard output, which only has answers; what they print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if rest == ["convert"]:
        system = create(options)
        print(json.dumps({"value": _timed(system.convert)}), file=answers, flush=True)
        os._exit(0)
    system = create(options)
    system.load()
    print(json.dumps({"ready": True, "about": system.about()}), file=answers, flush=True)
    serve(Server(system), sys.stdin, answers)
    answers.close()
    os._exit(0)  # some libraries crash or take seconds when they are unloaded


if __name__ == "__main__":
    from gptj8.runtime.process import prepare_to_compute

    prepare_to_compute()  # for all systems, because they all benefit equally
    main()
