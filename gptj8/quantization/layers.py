"""Modules whose weight is frozen in 8 bits and restored just in time (`gptj8.kernels.operators`).

A frozen layer costs one byte a weight and, for a moment, one restored matrix. They subclass torch's
own modules: PEFT wraps them like any other, and nothing has to be registered with it.

(Rejected: a tensor subclass, which needs a handler for every operator that a model may call;
keeping restored weights, which is what 8 bits are there to avoid.)

`absmax` and `codebook` stay float32 whatever a caller casts the module to: rounded to 16 bits they
would shift every block by up to 0.4 %, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptj8.kernels import operators  # noqa: F401 (defines the operator)
from gptj8.quantization.codebooks import CODEBOOK_SIZE
from gptj8.quantization.codec import QuantizedTensor, dequantize_blockwise

_FLOAT32_BUFFERS = ("absmax", "codebook")


class FrozenCodes(nn.Parameter):
    """A uint8 weight that refuses arithmetic in place.

    Adding to codes has no meaning, and PEFT's `merge_and_unload(safe_merge=True)` would do it
    without a word: it rounds the adapter to uint8, where most of it is zero, and drops it.
    """

    def __new__(cls, codes: torch.Tensor, requires_grad: bool = False) -> FrozenCodes:
        guarded = torch.Tensor._make_subclass(cls, codes.as_subclass(torch.Tensor), False)
        # transformers notes on a parameter that it has been loaded and must not be initialized.
        guarded.__dict__.update(codes.__dict__)
        return guarded

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in ("add_", "sub_", "mul_", "__iadd__", "__isub__", "__imul__"):
            # Not a TypeError: torch would turn that into a fallback to addition out of place.
            raise ValueError(
                "an adapter cannot be merged into 8-bit weights; restore them first: "
                "model = model.dequantize(torch.float32), then load the adapter and merge it"
            )
        if getattr(func, "__module__", "") in ("torch.nn.init", "transformers.initialization"):
            # transformers draws random weights for what it leaves on the disk; codes have none.
            return args[0] if args else (kwargs or {})["tensor"]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            # `weight.data` and its clone are what PEFT adds to; everything else is a plain tensor.
            is_copy = name in ("__get__", "clone") and isinstance(result, torch.Tensor)
            return cls(result) if is_copy else result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return FrozenCodes, (self.as_subclass(torch.Tensor),)


class Frozen8bitModule(nn.Module):
    """What the frozen modules share: a uint8 `weight` with float32 `absmax` and `codebook`."""

    weight: Any  # FrozenCodes; torch's modules declare it in ways of their own
    absmax: torch.Tensor
    codebook: torch.Tensor
    block_size: int

    def _allocate(self, shape: tuple[int, ...], block_size: int, device: Any) -> None:
        self.block_size = block_size
        self.weight = FrozenCodes(torch.zeros(shape, dtype=torch.uint8, device=device))
        blocks = math.ceil(math.prod(shape) / block_size)
        for name, length in (("absmax", blocks), ("codebook", CODEBOOK_SIZE)):
            self.register_buffer(name, torch.zeros(length, dtype=torch.float32, device=device))

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as the codec knows it."""
        return QuantizedTensor(self.weight.detach(), self.absmax, self.codebook, self.block_size)

    def share_scales(self) -> None:
        """Leave absmax and codebook out of the state dict: they are another module's, like the
        weight, and are stored once."""
        self._non_persistent_buffers_set.update(_FLOAT32_BUFFERS)

    def load_quantized(self, quantized: QuantizedTensor) -> None:
        """Take over quantized tensors; the shapes must be the module's own."""
        if quantized.codes.shape != self.weight.shape:
            raise ValueError(
                f"codes have shape {tuple(quantized.codes.shape)}, the module's weight "
                f"{tuple(self.weight.shape)}"
            )
        self.weight = FrozenCodes(quantized.codes)
        self.absmax, self.codebook = quantized.absmax, quantized.codebook
        self.block_size = quantized.block_size

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Keep the weight guarded, whoever sets it: loading replaces parameters by its own."""
        if name == "weight" and param is not None and not isinstance(param, FrozenCodes):
            param = FrozenCodes(param)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):  # type: ignore[no-untyped-def]
        kept = {name: getattr(self, name) for name in _FLOAT32_BUFFERS}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        self.weight = self._parameters["weight"]  # guarded again, if it was replaced
        return self

    def extra_repr(self) -> str:
        """Describe the module in a printed model."""
        return f"{super().extra_repr()}, 8-bit, block_size={self.block_size}"


class Frozen8bitLinear(Frozen8bitModule, nn.Linear):
    """`nn.Linear` with a frozen 8-bit weight (out, in); the bias may be trained."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 4096,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate((out_features, in_features), block_size, device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) in the dtype of x, or of autocast."""
        return _frozen_linear(self, x, transposed=False)


class Frozen8bitConv1D(Frozen8bitModule, Conv1D):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (in, out)."""

    def __init__(
        self,
        nf: int,
        nx: int,
        block_size: int = 4096,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx
        self._allocate((nx, nf), block_size, device)
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., nf) in the dtype of x, or of autocast."""
        return _frozen_linear(self, x, transposed=True)


class Frozen8bitEmbedding(Frozen8bitModule, nn.Embedding):
    """`nn.Embedding` with a frozen 8-bit weight; restores only the rows that are asked for.

    Attributes:
        output_dtype: what rows are restored to; follows casts of the module, because an embedding
            has no floating-point input to take it from.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        block_size: int = 4096,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.output_dtype = dtype or torch.get_default_dtype()
        self._allocate((num_embeddings, embedding_dim), block_size, device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Restore rows: ids (...) integer -> (..., embedding_dim) in `output_dtype`."""
        rows, dim = ids.reshape(-1), self.embedding_dim
        codes = self.weight.index_select(0, rows)
        if dim % self.block_size == 0 or self.block_size % dim == 0:
            # No block begins or ends inside a run of `step` weights, so one absmax serves each run.
            step = min(dim, self.block_size)
            runs = torch.arange(dim // step, device=rows.device)
            block = (rows[:, None] * (dim // step) + runs) // (self.block_size // step)
            scale = self.absmax[block].repeat_interleave(step, dim=1)
        else:
            element = rows[:, None] * dim + torch.arange(dim, device=rows.device)
            scale = self.absmax[element // self.block_size]
        values = self.codebook[codes.int()] * scale
        return values.to(self.output_dtype).view(*ids.shape, dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return self


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype that autocast computes products in; as it is where autocast is off."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _frozen_linear(module: Any, x: torch.Tensor, transposed: bool) -> torch.Tensor:
    codes = module.weight.detach()
    return torch.ops.gptj8.frozen_linear(
        in_autocast_dtype(x),
        codes,
        module.absmax,
        module.codebook,
        module.bias,
        module.block_size,
        transposed,
    )


def frozen_twin(module: nn.Module, block_size: int, dtype: torch.dtype | None) -> nn.Module | None:
    """Return an empty frozen module in place of `module`, on its device; None if it has no twin.

    Only exact `nn.Linear`, `nn.Embedding` and `Conv1D` have one: a subclass may compute something
    else.
    """
    if type(module) is nn.Linear:
        return Frozen8bitLinear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            block_size=block_size,
            device=module.weight.device,
            dtype=dtype,
        )
    if type(module) is nn.Embedding and module.max_norm is None:
        return Frozen8bitEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            block_size=block_size,
            device=module.weight.device,
            dtype=dtype,
        )
    if type(module) is Conv1D:
        return Frozen8bitConv1D(
            module.nf, module.nx, block_size, device=module.weight.device, dtype=dtype
        )
    return None


def full_precision_twin(module: Frozen8bitModule, dtype: torch.dtype) -> nn.Module:
    """Return the ordinary module with the restored weight; bias and mode are taken over."""
    weight = dequantize_blockwise(module.quantized_weight, dtype)
    twin: nn.Module
    with torch.device("meta"):
        if isinstance(module, Frozen8bitLinear):
            twin = nn.Linear(module.in_features, module.out_features, module.bias is not None)
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
