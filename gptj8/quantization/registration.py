"""Register the quantizer with transformers without importing transformers.

transformers has a registry of quantizers, but a package can only register after importing
`transformers.quantizers.auto`. That import takes seconds and loads torch, which `validate` and
`gptj8 --help` do not need. An import hook therefore registers the quantizer right after that module
is imported.

Alternatives considered: registering in `import gptj8` was rejected because of its cost; a function
for users to call was rejected because a forgotten call gives a model whose output is noise.
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
    """Import hook that registers the quantizer after the awaited module has been executed.

    It finds the module with the other finders and wraps its loader.
    """

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
    """Register the quantizer, now or as soon as transformers' quantizers are imported."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _register() -> None:
    # Importing this module registers the quantizer. If this module's own import triggered the hook,
    # it is only partially initialized here and registers when its import completes.
    importlib.import_module("gptj8.quantization.quantizer")
