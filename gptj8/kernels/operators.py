"""The product with a frozen 8-bit matrix, as a torch operator.

    forward     y = x W^T + b,     W = codebook[codes] * scale, restored temporarily
    backward    dx = dy W,         W restored again; there is no dW

Between forward and backward only the 8-bit tensors are kept, which the module holds anyway. Where
it is faster (`dispatch.most_rows`), W is not restored: a kernel multiplies directly from the codes.

Alternative considered: `torch.autograd.Function`; it was rejected because torch.compile and meta
tensors trace into it and fail at the first native call. They treat an operator as one opaque step
with a known output shape.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from gptj8.kernels import dispatch

# Weights restored per piece. The default is the size of an MLP matrix of GPT-J-6B. On a CPU, if x
# has at most `_CACHED_ROWS` rows, pieces are small enough to stay in the caches until they are
# multiplied. With more rows, small pieces are no faster.
_PIECE = 1 << 26
_CACHED_PIECE = 1 << 21
_CACHED_ROWS = 64


class _Keeping(threading.local):
    """Per-thread state: whether products keep their matrices, and the matrix of the last one."""

    wanted = False
    latest: torch.Tensor | None = None


_keeping = _Keeping()
# Keyed by the memory location of the codes. The codes are held too, so that their memory cannot be
# reused for other codes.
_kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}


class KeepingMatrices:
    """Context manager that keeps restored matrices until the backward pass has used them.

    Meant for the recomputation of a checkpointed block, right before its gradients, so that each
    matrix is restored only once for both. Only matrices restored in one piece are kept. This needs
    memory for the matrices of one block, because matrices left over from another block are dropped
    on entry. The context can be entered repeatedly, because a retained graph can be
    computed again.
    """

    def __enter__(self) -> None:
        drop_kept()
        _keeping.wanted = True

    def __exit__(self, *_: object) -> None:
        _keeping.wanted, _keeping.latest = False, None


def drop_kept() -> None:
    """Drop the matrices that no gradient has used."""
    _kept.clear()


def kept_bytes() -> int:
    """Return the total size of the kept matrices in bytes."""
    return sum(matrix.nbytes for _, matrix in _kept.values())


def frozen_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: int,
    transposed: bool,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + bias.

    Args:
        x: (..., in) float32, float16 or bfloat16; its dtype is the compute dtype.
        codes: uint8 (out, in), or (in, out) if transposed.
        absmax: the scales, float32 (blocks,), or uint8 codes of `levels`.
        codebook: float32 (256,).
        bias: (out,) or None, any floating dtype.
        block_size: weights per block, in the order of the codes.
        transposed: whether the codes are (in, out), as in GPT-2.
        levels: float32 (256,) if absmax is uint8.

    Returns:
        (..., out) in the dtype of x.
    """
    _keeping.latest = None
    bias = None if bias is None else bias.to(x.dtype)
    columns = codes.shape[0 if transposed else 1]
    if x.dim() == 0 or x.shape[-1] != columns:
        raise RuntimeError(f"x has shape {tuple(x.shape)}; its last dimension must be {columns}")
    if is_multiplied_from_codes(x, codes, codebook, block_size, across=transposed):
        y = dispatch.multiply(x, codes, absmax, codebook, block_size, levels, across=transposed)
        return y if bias is None else y.add_(bias)
    wanted, dtype = x.dtype, dispatch.arithmetic_dtype(x)
    if dtype != wanted:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    step = piece_rows(x, codes.shape, block_size, transposed)
    pieces = _restored_pieces(codes, absmax, levels, codebook, block_size, dtype, step)
    if step >= len(codes):
        ((_, weight),) = pieces
        if _keeping.wanted:
            _keeping.latest = weight
        return functional.linear(x, weight.t() if transposed else weight, bias).to(wanted)
    y = x.new_empty(x.numel() // columns, len(codes))
    flat = x.reshape(-1, columns)
    for rows, weight in pieces:
        if bias is None:
            torch.mm(flat, weight.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], flat, weight.t(), out=y[:, rows])
    return y.view(*x.shape[:-1], len(codes)).to(wanted)


def frozen_linear_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    transposed: bool,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of x (..., in), given the gradient of y (..., out)."""
    if is_multiplied_from_codes(grad, codes, codebook, block_size, across=not transposed):
        return dispatch.multiply(
            grad, codes, absmax, codebook, block_size, levels, across=not transposed
        )
    grad_x, wanted = None, grad.dtype
    grad = grad.to(dispatch.arithmetic_dtype(grad))
    step = piece_rows(grad, codes.shape, block_size, transposed)
    pieces = _restored_pieces(codes, absmax, levels, codebook, block_size, grad.dtype, step)
    for rows, weight in pieces:
        part = grad.matmul(weight.t()) if transposed else grad[..., rows].matmul(weight)
        grad_x = part if grad_x is None else grad_x.float().add_(part)
    assert grad_x is not None
    return grad_x.to(wanted)


def is_multiplied_from_codes(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, block_size: int, across: bool
) -> bool:
    """Return whether a product is computed without restoring W; see `dispatch.multiply`."""
    rows = x.numel() // max(1, x.shape[-1])
    return 0 < rows <= dispatch.most_rows(x, codes.shape[1], codebook, block_size, across)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    # Stored on ctx instead of with save_for_backward: activation checkpointing recomputes a block
    # up to its last saved tensor. The gradient needs only these constants, so the last product of a
    # block, a third of the work in GPT-J, is not recomputed.
    _, *quantized, _, ctx.block_size, ctx.transposed, ctx.levels = inputs
    ctx.quantized = quantized
    if _keeping.latest is not None and ctx.needs_input_grad[0]:
        _kept[_place(quantized[0])] = quantized[0], _keeping.latest


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _take_kept(ctx.quantized[0]) if _kept else None
        if weight is not None and weight.dtype == dispatch.arithmetic_dtype(grad):
            product = grad.to(weight.dtype).matmul(weight.t() if ctx.transposed else weight)
            grad_x = product.to(grad.dtype)
        else:
            backward = torch.ops.gptj8.frozen_linear_backward
            grad_x = backward(grad, *ctx.quantized, ctx.block_size, ctx.transposed, ctx.levels)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None


def _take_kept(codes: torch.Tensor) -> torch.Tensor | None:
    _, weight = _kept.pop(_place(codes), (None, None))
    return weight


def _place(codes: torch.Tensor) -> tuple[int, int]:
    return codes.untyped_storage()._cdata, int(codes.storage_offset())


def _restored_pieces(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor | None,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    step: int,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a restored matrix in pieces of `step` rows, each valid until the next one."""
    rows, columns = codes.shape
    for start in range(0, rows, step):
        part = codes[start : start + step]
        first = start * columns // block_size
        scales = absmax[first : first + -(-part.numel() // block_size)]
        if _keeping.wanted and step >= rows:
            out = torch.empty(part.shape, dtype=dtype, device=codes.device)
        else:
            out = dispatch.scratch(part.shape, dtype, codes.device)
        yield (
            slice(start, start + len(part)),
            dispatch.dequantize(part, scales, codebook, block_size, dtype, out, levels),
        )


def piece_rows(x: torch.Tensor, shape: Sequence[int], block_size: int, whole: bool) -> int:
    """Return how many rows of a matrix are restored per piece.

    Args:
        x: the input of the product.
        shape: (rows, columns) of the codes.
        block_size: weights per block.
        whole: whether the matrix must be restored in one piece.
    """
    rows, columns = shape
    is_small = x.device.type == "cpu" and x.numel() <= _CACHED_ROWS * x.shape[-1]
    piece = _CACHED_PIECE if is_small else _PIECE
    if whole or rows * columns <= piece:
        return rows
    aligned = block_size // math.gcd(block_size, columns)  # fewest rows that end at a block's end
    return min(rows, max(aligned, piece // columns // aligned * aligned))


def _setup_double_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *ctx.quantized, ctx.block_size, ctx.transposed, ctx.levels = inputs


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the backward product.

    dx = dy W is linear in dy, so its gradient is the forward product without a bias.
    """
    forward = torch.ops.gptj8.frozen_linear
    grad_grad = forward(grad, *ctx.quantized, None, ctx.block_size, ctx.transposed, ctx.levels)
    return grad_grad, None, None, None, None, None, None


# Not defined with `torch.library.custom_op`: its wrapper takes as long as a small product.
_LIBRARY = torch.library.Library("gptj8", "DEF")
_LIBRARY.define(
    "frozen_linear(Tensor x, Tensor codes, Tensor absmax, Tensor codebook, Tensor? bias, "
    "int block_size, bool transposed, Tensor? levels=None) -> Tensor"
)
_LIBRARY.define(
    "frozen_linear_backward(Tensor grad, Tensor codes, Tensor absmax, Tensor codebook, "
    "int block_size, bool transposed, Tensor? levels=None) -> Tensor"
)
_LIBRARY.impl("frozen_linear", frozen_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("frozen_linear_backward", frozen_linear_backward, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "gptj8::frozen_linear", _backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "gptj8::frozen_linear_backward",
    _double_backward,
    setup_context=_setup_double_context,
    lib=_LIBRARY,
)


@torch.library.register_fake("gptj8::frozen_linear", lib=_LIBRARY)
def _(x, codes, absmax, codebook, bias, block_size, transposed, levels=None):  # type: ignore[no-untyped-def]
    _keeping.latest = None
    if _keeping.wanted and not is_multiplied_from_codes(
        x, codes, codebook, block_size, across=transposed
    ):
        whole = piece_rows(x, codes.shape, block_size, transposed) >= len(codes)
        dtype = dispatch.arithmetic_dtype(x)
        _keeping.latest = x.new_empty(codes.shape, dtype=dtype) if whole else None
    return x.new_empty(*x.shape[:-1], codes.shape[1 if transposed else 0])


@torch.library.register_fake("gptj8::frozen_linear_backward", lib=_LIBRARY)
def _(grad, codes, absmax, codebook, block_size, transposed, levels=None):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], codes.shape[0 if transposed else 1])
