"""OpenVINO with int8 weights, compressed by NNCF: what optimum-intel exports for text generation.

The exported model keeps its keys and values as a state. Run with the settings that OpenVINO picks
for latency: on many CPUs it quantizes activations in small groups, and the cache to 8 bits.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino

from benchmarks.opponents.server import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Options,
    System,
    seconds_per_position,
)


class OpenVINO(System):
    """A compiled model on the CPU, and one request for it."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._folder = options.folder / "model"
        self._request: Any = None

    def convert(self) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        model = OVModelForCausalLM.from_pretrained(
            self.options.original,
            export=True,
            compile=False,
            quantization_config=OVWeightQuantizationConfig(bits=8),
        )
        model.save_pretrained(self._folder)

    def load(self) -> None:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_NUM_THREADS"] = self.options.threads
        if self.options.dtype == "float32":  # otherwise it picks bfloat16 where it is fast
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        core = openvino.Core()
        model = core.compile_model(self._folder / "openvino_model.xml", "CPU", settings)
        self._request = model.create_infer_request()
        self.prefill(8)

    def unload(self) -> None:
        self._request = None

    def about(self) -> dict[str, str]:
        model = self._request.get_compiled_model()
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        found = {name.lower(): model.get_property(name).get_type_name() for name in names}
        features = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {"openvino": openvino.__version__, **found, "capabilities": " ".join(features)}

    def prefill(self, tokens: int) -> None:
        self._request.reset_state()
        self._step(np.array(self.sequences(1, tokens)), 0)

    def decode(self, rows: int) -> float:
        self._request.reset_state()
        ids, seen, times = np.array(self.sequences(rows, PROMPT_TOKENS)), 0, []
        for _ in range(NEW_TOKENS):
            logits = self._step(ids, seen)
            seen += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter())
        return seconds_per_position(times)

    def _step(self, ids: np.ndarray, seen: int) -> np.ndarray:
        """Return the logits (rows, new tokens, vocabulary) after `seen` earlier tokens."""
        rows, new = ids.shape
        positions = np.arange(seen, seen + new)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, seen + new), np.int64),
            "position_ids": np.broadcast_to(positions, ids.shape),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self._request.infer(inputs, share_inputs=True)
        return self._request.get_output_tensor(0).data


def create(options: Options) -> OpenVINO:
    """Return the system."""
    return OpenVINO(options)
