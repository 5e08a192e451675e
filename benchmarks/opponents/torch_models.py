"""What all models have in common that transformers computes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.opponents.server import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Options,
    System,
    seconds_per_position,
)
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import pick_device
from gptj8.runtime.machine import peak_memory_gib
from gptj8.training.activation_checkpointing import set_checkpointing

OUTPUT_TOKENS = 64


class _Clock(BaseStreamer):
    """Record the time of each generated token; the first call passes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class TorchModel(System):
    """A model of transformers with a LoRA adapter; subclasses load its base model."""

    decode_cache: str | None = None  # transformers' default

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.device = pick_device()
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.model: Any = None
        self._adapted: Any = None
        if self.device.type == "cpu":
            torch.set_num_threads(options.threads)

    def load_base(self) -> Any:
        """Return the base model, loaded as users of the system load it."""
        raise NotImplementedError

    def load(self) -> None:
        self.model = self.load_base().eval()
        with torch.inference_mode():
            self.model(input_ids=self._ids(1, 8))
        self._finish()

    def unload(self) -> None:
        self.model = self._adapted = None

    def about(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "torch's kernels": torch.backends.cpu.get_cpu_capability(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def memory(self) -> float:
        return peak_memory_gib()

    def train(self, rows: int, tokens: int) -> None:
        model = self.adapted().train()
        self.loss(model, self._ids(rows, tokens)).backward()
        model.zero_grad()
        self._finish()

    def prefill(self, tokens: int) -> None:
        model = self.adapted().eval()  # adapters made in inference mode cannot be trained
        with torch.inference_mode():
            model(input_ids=self._ids(1, tokens), use_cache=False)
        self._finish()

    def decode(self, rows: int) -> float:
        prompts, clock = self._ids(rows, PROMPT_TOKENS), _Clock()
        self.adapted().eval().generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            use_cache=True,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=self.decode_cache,
            streamer=clock,
        )
        return seconds_per_position(clock.times[1:])  # the first is the prompt's

    def outputs(self, file: Path) -> None:
        model, ids = self.adapted(), self._ids(1, OUTPUT_TOKENS)
        self.loss(model.train(), ids).backward()
        gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        results = {"logits": logits.float().flatten(), "gradients": torch.cat(gradients)}
        torch.save({name: tensor.cpu() for name, tensor in results.items()}, file)

    def loss(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the rows."""
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def adapted(self) -> Any:
        """Return the model with an adapter, always with the same weights; it is added once."""
        if self._adapted is None:
            torch.manual_seed(0)
            spec = AdapterSpec(target=self.options.adapter)
            self._adapted = add_adapter(self.model, spec).to(self.device)
            self._set_checkpointing(self._adapted)
        return self._adapted

    def _set_checkpointing(self, model: Any) -> None:
        set_checkpointing(model, self.options.checkpointing)  # type: ignore[arg-type]

    def _ids(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.tensor(self.sequences(rows, tokens), device=self.device)

    def _finish(self) -> None:
        """Wait for pending GPU operations."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
