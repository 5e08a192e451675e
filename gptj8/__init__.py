"""gptj8: fine-tune language models with large weights that are frozen in 8 bits.

`import gptj8` lets transformers load converted models. The import is cheap: torch and transformers
are imported when a public name is first accessed, and the quantizer is registered when transformers
loads its own quantizers.
"""

from __future__ import annotations

import importlib
from typing import Any

from gptj8.quantization.registration import register_when_transformers_loads
from gptj8.runtime.version import __version__ as __version__

_MODULES = {
    "Blockwise8bitConfig": "gptj8.quantization.quantizer",
    "convert_checkpoint": "gptj8.quantization.conversion",
    "dequantize_blockwise": "gptj8.quantization.codec",
    "quantize_blockwise": "gptj8.quantization.codec",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'gptj8' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


register_when_transformers_loads()
