"""Register the quantizer with transformers without importing transformers.

transformers has a registry of quantizers but no way for a package to announce one before
`transformers.quantizers.auto` is imported, and importing that costs seconds and torch, which
`validate` and `gptj8 --help` do not need. So an import hook waits for that one module and registers
right after it has run. (Rejected: registering in `import gptj8`, for its cost; asking users to call
a function, because a forgotten call shows as a model that loads as noise.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_AWAITED = "transformers.quantizers.auto"


class _Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the awaited module through the ordinary finders and adds a step behind its loader."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        _register()


def register_when_transformers_loads() -> None:
    """Register now if transformers' quantizers are loaded, else as soon as they are."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register() -> None:
    # Importing it registers. Where its own import is what loaded transformers' quantizers, it is
    # half-made at this point, and goes on to register by itself.
    importlib.import_module("gptj8.quantization.quantizer")
