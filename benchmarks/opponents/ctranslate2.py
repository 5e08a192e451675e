"""CTranslate2 with int8 weights and activations, made by its own converter for GPT-J."""

from __future__ import annotations

import time

import ctranslate2

from benchmarks.opponents.server import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Options,
    System,
    seconds_per_position,
)
from benchmarks.opponents.shapes import word


class CTranslate2(System):
    """A generator on the CPU."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._folder = options.folder / "model"
        self._generator: ctranslate2.Generator | None = None

    def convert(self) -> None:
        converter = ctranslate2.converters.TransformersConverter(
            str(self.options.original), low_cpu_mem_usage=True
        )
        converter.convert(str(self._folder), quantization="int8")

    def load(self) -> None:
        self._generator = ctranslate2.Generator(
            str(self._folder), compute_type="int8", intra_threads=self.options.threads
        )
        self.prefill(8)

    def unload(self) -> None:
        self._generator = None

    def about(self) -> dict[str, str]:
        return {"ctranslate2": ctranslate2.__version__}

    def prefill(self, tokens: int) -> None:
        self._loaded().forward_batch(self.sequences(1, tokens))

    def decode(self, rows: int) -> float:
        # Logits are computed for numbers, but a generation starts from words.
        prompts = [[word(token) for token in ids] for ids in self.sequences(rows, PROMPT_TOKENS)]
        times: list[float] = []

        def note(step: ctranslate2.GenerationStepResult) -> bool:
            if step.batch_id == 0:
                times.append(time.perf_counter())
            return False

        self._loaded().generate_batch(
            prompts,
            max_length=NEW_TOKENS,
            min_length=NEW_TOKENS,
            include_prompt_in_result=False,
            end_token=[],
            callback=note,
        )
        if len(times) < NEW_TOKENS:
            raise RuntimeError(f"generated {len(times)} tokens instead of {NEW_TOKENS}")
        return seconds_per_position(times)

    def _loaded(self) -> ctranslate2.Generator:
        assert self._generator is not None
        return self._generator


def create(options: Options) -> CTranslate2:
    """Return the system."""
    return CTranslate2(options)
