"""gptj8: fine-tune GPT-J-class models whose large weights are frozen in 8 bits.

`import gptj8` makes transformers understand converted models. It costs nothing until something of
it is used: torch and transformers are imported when a name below is first asked for, and the
quantizer is registered when transformers itself comes to load its quantizers.
"""

from __future__ import annotations

import importlib
from typing import Any

from gptj8.quantization.registration import register_when_transformers_loads
from gptj8.runtime.version import __version__ as __version__

_HOMES = {
    "Blockwise8bitConfig": "gptj8.quantization.quantizer",
    "convert_checkpoint": "gptj8.quantization.conversion",
    "dequantize_blockwise": "gptj8.quantization.codec",
    "quantize_blockwise": "gptj8.quantization.codec",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gptj8' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_when_transformers_loads()
