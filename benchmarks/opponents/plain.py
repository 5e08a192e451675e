"""The baseline: stock transformers and PEFT in a floating-point dtype."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.opponents.server import Options
from benchmarks.opponents.torch_models import TorchModel


class Plain(TorchModel):
    """Weights in the dtype that is computed in."""

    def load_base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.options.original, dtype=self.dtype, device_map={"": self.device}
        )


create: type[Plain] = Plain


def load(options: Options) -> Any:
    """Return the model in full precision, on the CPU, for systems that quantize it themselves."""
    return AutoModelForCausalLM.from_pretrained(options.original, dtype=options.dtype)
