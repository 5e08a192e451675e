"""Modules with frozen 8-bit weights that are restored when needed (`gptj8.kernels.operators`).

A frozen layer needs one byte per weight and, temporarily, memory for one restored matrix. The
modules subclass torch's own, so PEFT wraps them like any other without registration.

Alternatives considered: a tensor subclass was rejected because it needs a handler for every
operator that a model may call; caching restored weights was rejected because it needs the memory
that 8 bits save.

Scales and codebook keep their dtype even if the module is cast to another one. Rounding them to 16
bits would silently shift every block by up to 0.4 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptj8.kernels import operators  # noqa: F401 (defines the operator)
from gptj8.quantization.codebooks import CODEBOOK_SIZE
from gptj8.quantization.codec import QuantizedTensor, dequantize_blockwise
from gptj8.runtime.errors import QuantizationError

QUANTIZED_BUFFERS = ("absmax", "codebook", "levels", "input_scales")
"""Names of a frozen module's buffers; `levels` is None if scales have 32 bits, and `input_scales`
unless the model was calibrated."""


# What a model must not compute with codes: the result would be meaningless.
_ARITHMETIC = frozenset(
    f"{prefix}{name}{suffix}"
    for name in "add sub mul div matmul truediv".split()
    for prefix, suffix in (("", ""), ("__", "__"), ("__r", "__"))
) | frozenset(
    "linear mm bmm mv addmm addmv addbmm baddbmm einsum tensordot bilinear embedding embedding_bag "
    "conv1d conv2d conv_transpose1d float half bfloat16 double type_as norm mean sum exp neg "
    "addcmul lerp svd qr mul_ div_ __imul__ __itruediv__".split()
)


class CodesUsedAsWeightsError(QuantizationError):
    """A model computes with the codes of a frozen module, or casts its activations to their dtype.

    Attributes:
        codes: the weight, if known.
    """

    def __init__(self, codes: torch.Tensor | None = None) -> None:
        super().__init__(
            "the model uses the weight of an 8-bit module directly, which would read the codes as "
            "weights; list the module in skip_modules"
        )
        self.codes = codes


class FrozenCodes(nn.Parameter):
    """A uint8 weight that raises an error if it is used in arithmetic.

    Some models compute with a module's weight instead of calling the module. PEFT's
    `merge_and_unload(safe_merge=True)` would add to codes silently: it casts the adapter to uint8,
    where most values become zero, and discards it.
    """

    def __new__(cls, codes: torch.Tensor, requires_grad: bool = False) -> FrozenCodes:
        guarded = torch.Tensor._make_subclass(cls, codes.as_subclass(torch.Tensor), False)
        # transformers marks a loaded parameter with an attribute so that it is not initialized.
        guarded.__dict__.update(codes.__dict__)
        return guarded

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in ("add_", "sub_", "__iadd__", "__isub__"):
            # Not a TypeError, because torch would then fall back to out-of-place addition.
            raise ValueError(
                "an adapter cannot be merged into 8-bit weights; restore them first with "
                "model = model.dequantize(torch.float32), then load and merge the adapter"
            )
        if name in _ARITHMETIC or (name in ("to", "type") and _is_cast_to_float(args, kwargs)):
            raise CodesUsedAsWeightsError(next((a for a in args if isinstance(a, cls)), None))
        if getattr(func, "__module__", "") in ("torch.nn.init", "transformers.initialization"):
            # transformers initializes weights that it leaves on disk, but codes have no random
            # initialization.
            return args[0] if args else (kwargs or {})["tensor"]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            # PEFT adds to `weight.data` and its clones, so they stay guarded. Other results become
            # plain tensors.
            is_copy = name in ("__get__", "clone") and isinstance(result, torch.Tensor)
            return cls(result) if is_copy else result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return FrozenCodes, (self.as_subclass(torch.Tensor),)


def _is_cast_to_float(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    values = (*args[1:], *(kwargs or {}).values())
    return any(isinstance(v, torch.dtype) and v.is_floating_point for v in values)


class Frozen8bitModule(nn.Module):
    """Base class of frozen modules: a uint8 `weight` with `absmax`, `codebook` and `levels`.

    See `gptj8.quantization.codec.QuantizedTensor` for their shapes. With `input_scales`, float32
    (in,), the restored matrix is the weight divided by them, column by column, and inputs are
    multiplied by them first (`gptj8.quantization.calibration`).
    """

    weight: Any  # FrozenCodes; torch's modules declare it with different types
    absmax: torch.Tensor
    codebook: torch.Tensor
    levels: torch.Tensor | None
    input_scales: torch.Tensor | None
    input_dim = 1
    block_size: int

    def _allocate(
        self, shape: tuple[int, ...], block_size: int, scale_bits: int, device: Any
    ) -> None:
        self.block_size = block_size
        self.weight = FrozenCodes(torch.zeros(shape, dtype=torch.uint8, device=device))
        blocks = math.ceil(math.prod(shape) / block_size)
        kind = torch.uint8 if scale_bits == 8 else torch.float32
        self.register_buffer("absmax", torch.zeros(blocks, dtype=kind, device=device))
        codebook = torch.zeros(CODEBOOK_SIZE, dtype=torch.float32, device=device)
        self.register_buffer("codebook", codebook)
        self.register_buffer("levels", torch.zeros_like(codebook) if scale_bits == 8 else None)
        self.register_buffer("input_scales", None)

    def allocate_input_scales(self) -> None:
        """Add `input_scales`, filled with ones."""
        columns = self.weight.shape[self.input_dim]
        self.input_scales = torch.ones(columns, dtype=torch.float32, device=self.weight.device)

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what is quantized: the weight divided by `input_scales`, if there are any."""
        if self.input_scales is None:
            return weight
        return weight.float() / self.along_columns(self.input_scales)

    def restore(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in full precision."""
        if self.input_scales is None:
            return dequantize_blockwise(self.quantized_weight, dtype)
        restored = dequantize_blockwise(self.quantized_weight, torch.float32)
        return restored.mul_(self.along_columns(self.input_scales)).to(dtype)

    def along_columns(self, scales: torch.Tensor) -> torch.Tensor:
        """Return scales (in,) in a shape that multiplies the columns of the weight."""
        return scales if self.input_dim == 1 else scales[:, None]

    @property
    def buffer_names(self) -> list[str]:
        """Names of the buffers that are part of the weight."""
        return [name for name in QUANTIZED_BUFFERS if getattr(self, name) is not None]

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The codes as a `QuantizedTensor`, without `input_scales`."""
        return QuantizedTensor(
            self.weight.detach(), self.absmax, self.codebook, self.block_size, self.levels
        )

    def share_scales(self) -> None:
        """Exclude scales and codebook from the state dict.

        For a module with a tied weight, whose scales and codebook are saved by the other module.
        """
        self._non_persistent_buffers_set.update(QUANTIZED_BUFFERS)

    def use_scales_of(self, other: Frozen8bitModule) -> None:
        """Use the scales and the codebook of a module with the same weight."""
        for name in QUANTIZED_BUFFERS:
            setattr(self, name, getattr(other, name))
        self.block_size = other.block_size

    def load_quantized(self, quantized: QuantizedTensor) -> None:
        """Replace the weight by quantized tensors.

        Raises:
            ValueError: if the shape differs from the module's weight.
        """
        if quantized.codes.shape != self.weight.shape:
            raise ValueError(
                f"the codes have shape {tuple(quantized.codes.shape)}, but the module's weight has "
                f"shape {tuple(self.weight.shape)}"
            )
        self.weight = FrozenCodes(quantized.codes)
        self.absmax, self.codebook = quantized.absmax, quantized.codebook
        self.levels = quantized.levels
        self.block_size = quantized.block_size

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, with the weight wrapped in `FrozenCodes`.

        Needed because loading a model replaces parameters.
        """
        if name == "weight" and param is not None and not isinstance(param, FrozenCodes):
            param = FrozenCodes(param)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):  # type: ignore[no-untyped-def]
        kept = {name: getattr(self, name) for name in self.buffer_names}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        self.weight = self._parameters["weight"]  # wraps it in FrozenCodes again if it was replaced
        return self

    def extra_repr(self) -> str:
        """Return the description shown when the model is printed."""
        return (
            f"{super().extra_repr()}, 8-bit, block_size={self.block_size}, "
            f"scale_bits={32 if self.levels is None else 8}"
        )


class Frozen8bitLinear(Frozen8bitModule, nn.Linear):
    """`nn.Linear` with a frozen 8-bit weight (out, in); the bias can be trained."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 4096,
        device: Any = None,
        dtype: torch.dtype | None = None,
        scale_bits: int = 32,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate((out_features, in_features), block_size, scale_bits, device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) in the autocast dtype if autocast is on, else that of x."""
        return _frozen_linear(self, x, transposed=False)


class Frozen8bitConv1D(Frozen8bitModule, Conv1D):
    """transformers' `Conv1D` (GPT-2), a linear layer, with a frozen 8-bit weight (in, out)."""

    input_dim = 0

    def __init__(
        self,
        nf: int,
        nx: int,
        block_size: int = 4096,
        device: Any = None,
        dtype: torch.dtype | None = None,
        scale_bits: int = 32,
    ) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx
        self._allocate((nx, nf), block_size, scale_bits, device)
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., nf) in the autocast dtype if autocast is on, else that of x."""
        return _frozen_linear(self, x, transposed=True)


class Frozen8bitEmbedding(Frozen8bitModule, nn.Embedding):
    """`nn.Embedding` with a frozen 8-bit weight; restores only the rows that are looked up.

    Attributes:
        output_dtype: dtype of the output. It follows casts of the module, because an embedding has
            no floating-point input to take the dtype from.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        block_size: int = 4096,
        device: Any = None,
        dtype: torch.dtype | None = None,
        scale_bits: int = 32,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.output_dtype = dtype or torch.get_default_dtype()
        self._allocate((num_embeddings, embedding_dim), block_size, scale_bits, device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (..., embedding_dim) in `output_dtype` for integer ids (...)."""
        rows, dim = ids.reshape(-1), self.embedding_dim
        codes = self.weight.detach().index_select(0, rows)
        if dim % self.block_size == 0 or self.block_size % dim == 0:
            # No block begins or ends inside a run of `step` weights, so each run has one absmax.
            step = min(dim, self.block_size)
            runs = torch.arange(dim // step, device=rows.device)
            block = (rows[:, None] * (dim // step) + runs) // (self.block_size // step)
            scale = self._scales(block).repeat_interleave(step, dim=1)
        else:
            element = rows[:, None] * dim + torch.arange(dim, device=rows.device)
            scale = self._scales(element // self.block_size)
        values = self.codebook[codes.int()] * scale
        if self.input_scales is not None:  # of the head that shares the weight
            values = values * self.input_scales
        return values.to(self.output_dtype).view(*ids.shape, dim)

    def _scales(self, blocks: torch.Tensor) -> torch.Tensor:
        found = self.absmax[blocks]
        return found if self.levels is None else self.levels[found.int()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return self


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """Return x in the autocast dtype, or unchanged if autocast is off."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _frozen_linear(module: Any, x: torch.Tensor, transposed: bool) -> torch.Tensor:
    codes = module.weight.detach()
    if not x.is_floating_point():  # Mamba 2 casts it to the dtype of the weight
        raise CodesUsedAsWeightsError(codes)
    x = in_autocast_dtype(x)
    if module.input_scales is not None:
        x = x * module.input_scales.to(x.dtype)  # powers of two, so nothing is rounded
    return torch.ops.gptj8.frozen_linear(
        x,
        codes,
        module.absmax,
        module.codebook,
        module.bias,
        module.block_size,
        transposed,
        module.levels,
    )
