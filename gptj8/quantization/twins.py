"""Frozen 8-bit versions of modules, and ordinary versions of frozen modules.

Subclasses of torch's modules are served if they add something to what torch's module computes:

- Embeddings, such as Gemma's, which scales the rows, or BART's for positions, which shifts the ids.
  The subclass's own `forward` runs, and its `super().forward` looks up 8-bit rows.
- Linear layers that compute the same as `nn.Linear` in other words, such as Falcon's. This is
  found out with a few numbers. Others, such as routers, stay in full precision.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from gptj8.quantization.layers import (
    QUANTIZED_BUFFERS,
    CodesUsedAsWeightsError,
    Frozen8bitConv1D,
    Frozen8bitEmbedding,
    Frozen8bitLinear,
    Frozen8bitModule,
    FrozenCodes,
)

# What torch's own modules keep in `__dict__` for parameters, buffers and children.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def frozen_twin(
    module: nn.Module, block_size: int, dtype: torch.dtype | None, scale_bits: int = 32
) -> nn.Module | None:
    """Return an empty frozen module to replace `module`, on the same device, or None."""
    settings: dict[str, Any] = {
        "block_size": block_size,
        "device": getattr(getattr(module, "weight", None), "device", None),
        "dtype": dtype,
        "scale_bits": scale_bits,
    }
    if isinstance(module, Frozen8bitModule):
        return None
    if isinstance(module, nn.Linear) and _is_linear(module):
        has_bias = module.bias is not None
        return Frozen8bitLinear(module.in_features, module.out_features, has_bias, **settings)
    if type(module) is Conv1D:
        return Frozen8bitConv1D(module.nf, module.nx, **settings)
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        frozen = Frozen8bitEmbedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, **settings
        )
        return frozen if type(module) is nn.Embedding else _frozen_subclass(module, frozen)
    return None


def full_precision_twin(module: Frozen8bitModule, dtype: torch.dtype) -> nn.Module:
    """Return an ordinary module with the restored weight and the same bias and training mode."""
    weight = module.restore(dtype)
    twin: nn.Module
    with torch.device("meta"):
        if isinstance(module, Frozen8bitLinear):
            twin = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, FrozenSubclass):
            twin = _like(module, module.original_class)
        elif isinstance(module, Frozen8bitEmbedding):
            twin = nn.Embedding(
                module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx
            )
        else:
            assert isinstance(module, Frozen8bitConv1D)
            twin = Conv1D(module.nf, module.nx)
    twin.weight = nn.Parameter(weight)
    if getattr(module, "bias", None) is not None:
        twin.bias = nn.Parameter(cast(torch.Tensor, module.bias).detach().to(dtype))
    twin.train(module.training)
    return twin


class FrozenSubclass(Frozen8bitEmbedding):
    """A frozen embedding that runs the `forward` of a subclass of `nn.Embedding`.

    That method runs on a stand-in, which has the attributes of the module but an empty `weight` in
    `output_dtype`. Subclasses read the weight's dtype and device; whatever computes with the empty
    weight raises an error.
    """

    original_class: ClassVar[type[nn.Embedding]]
    stand_in_class: ClassVar[type[nn.Embedding]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the subclass computes from the 8-bit rows."""
        stand_in = self.stand_in_class.__new__(self.stand_in_class)
        empty = torch.empty(0, dtype=self.output_dtype, device=self.weight.device)
        if type(empty) is torch.Tensor:  # not while memory is estimated without data
            empty = FrozenCodes(empty)
        stand_in.__dict__.update(self.__dict__, frozen=self)
        stand_in.__dict__["_parameters"] = {**self._parameters, "weight": empty}
        try:
            # accelerate's hooks replace `forward` in the instance, which would lead back here.
            return self.stand_in_class.forward(stand_in, *args, **kwargs)
        except CodesUsedAsWeightsError:
            raise CodesUsedAsWeightsError(self.weight) from None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_subclass, (self.original_class,), self.__dict__


class _LookUp(nn.Embedding):
    """What `super().forward` of the stand-in calls."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return Frozen8bitEmbedding.forward(self.__dict__["frozen"], ids)


@functools.cache
def _subclass_of(original: type[nn.Embedding]) -> type[FrozenSubclass]:
    stand_in = type(f"{original.__name__}StandIn", (original, _LookUp), {})
    members = {"original_class": original, "stand_in_class": stand_in}
    kind: Any = type(f"Frozen8bit{original.__name__}", (FrozenSubclass, original), members)
    return cast(type[FrozenSubclass], kind)


def _empty_subclass(original: Any) -> FrozenSubclass:
    kind = _subclass_of(original)
    return cast(FrozenSubclass, nn.Module.__new__(kind))


def _frozen_subclass(module: nn.Embedding, frozen: Frozen8bitEmbedding) -> FrozenSubclass:
    """Return `frozen` with the class, attributes and other tensors of `module`."""
    twin = _like(module, _subclass_of(cast(Any, type(module))))
    twin.__dict__.update({k: v for k, v in frozen.__dict__.items() if k not in _REGISTRIES})
    twin.weight = frozen.weight
    for name in QUANTIZED_BUFFERS:
        twin.register_buffer(name, getattr(frozen, name))
    return cast(FrozenSubclass, twin)


def _like(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of another class with all that `module` has, except for its weight."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for registry in _REGISTRIES:
        twin.__dict__[registry] = module.__dict__[registry].copy()
    del twin._parameters["weight"]
    for name in QUANTIZED_BUFFERS:
        twin._buffers.pop(name, None)
    return twin


def _is_linear(module: nn.Linear) -> bool:
    """Return whether a module computes the same as `nn.Linear`."""
    if type(module) is nn.Linear:
        return True
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # its owner, torch's attention, computes with the weight itself
    if len(module._parameters) != 2 or module._buffers or module._modules:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 4, 8, generator=generator, device="cpu")
    bias = None if module.bias is None else weight.sum(1)
    probe: Any = _like(module, type(module))
    probe.in_features, probe.out_features = 8, 4
    probe._parameters = {"weight": weight, "bias": bias}
    try:
        found = probe.forward(x)
    except Exception:  # any subclass, which may need anything else
        return False
    expected = nn.functional.linear(x, weight, bias)
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected)
