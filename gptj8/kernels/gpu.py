"""Triton kernels for NVIDIA GPUs: restored weights, and a linear layer that restores none.

    dequantize  w = codebook[codes] * absmax, rounded to the nearest number of the output's dtype
    linear      y = x W^T + b for a few rows x, as in decoding: one byte is read a weight, looked up
                and multiplied in registers, and only y is written

Writing W in 16 bits and reading it again would move five bytes a weight instead of one, and moving
bytes is what few rows cost. With more rows the multiplications cost more than that, and torch's
product of the restored matrix wins: `linear` takes at most `MAX_ROWS`.

A matrix (out, in) is one row of out * in numbers to the codec, so a block may span several of its
rows or end inside one. `linear` walks along the rows in tiles. Where no block can end inside a row
of a tile, one absmax serves all of it; any other shape looks an absmax up for each weight.

Products are summed in float32, in registers: one sum for each row of x and each weight of a tile,
added up at the end. (Rejected: tensor cores for two rows and more. They multiply 16 rows whether
these are there or not; Triton's pipeline for them sends every lookup through shared memory, and
without it a matrix of 4096 rows gives too few programs to keep a large GPU's memory busy; they need
weights rounded to 16 bits, and capability 8.0. This was judged by compiled code, not by a clock.)

The module imports without Triton, and nothing is compiled before the first call. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, which is how they are tested where
there is no GPU.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gptj8.kernels import reference

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by `_load`

MAX_ROWS = 16

_OLDEST_CAPABILITY = (7, 0)
_DEQUANTIZE_TILE = 1024  # weights a program; one absmax serves them all where blocks are as large

# Columns of a tile: at most 16 bytes for each thread of a warp, and at least what is worth a load.
_WIDEST, _NARROWEST = 512, 64

# (weights a tile, warps a program). Few, because each is compiled and timed at the first call for a
# shape.
_TILES = ((4096, 4), (4096, 8), (2048, 4), (2048, 8), (1024, 4))
_SUMS_A_THREAD = 128  # of 255 registers

# Set by `_load`, like `tl`: Triton looks up the names in a kernel among the module's own.
_store_rounded: Any = None

_logger = logging.getLogger(__name__)


def is_available(device: torch.device) -> bool:
    """Return whether the kernels work on a device: found out once, by a small tensor.

    True for CUDA of compute capability 7.0 or newer, and with TRITON_INTERPRET=1 for the CPU.
    """
    if device.type == "cpu":
        return _interpreter_wanted() and _works("cpu", None)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return _works("cuda", torch.cuda.current_device() if device.index is None else device.index)


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return codebook[codes] * absmax, bit for bit as `reference.dequantize`.

    Args:
        codes: uint8, contiguous, any shape.
        absmax: float32 (blocks,).
        codebook: float32 (256,).
        block_size: weights a block.
        dtype: float32, float16 or bfloat16.
        out: where to put the result: contiguous, of `dtype`, the codes' shape and device.

    Returns:
        `out`, or a new tensor of `dtype`, the codes' shape and device.
    """
    out = torch.empty_like(codes, dtype=dtype) if out is None else out
    _check(codes, absmax, codebook, block_size)
    assert out.is_contiguous() and out.dtype == dtype and out.shape == codes.shape
    n = codes.numel()
    if n:
        with torch.cuda.device_of(codes):
            _load().dequantize[(-(-n // _DEQUANTIZE_TILE),)](
                codes, absmax, codebook, _as_bits(out), n, block_size, _DEQUANTIZE_TILE
            )
    return out


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: int,
) -> torch.Tensor:
    """Return x W^T + bias for the W that codes stand for, without restoring it.

    Args:
        x: (rows, in), float32, float16 or bfloat16; at most `MAX_ROWS` rows.
        codes: uint8 (out, in), contiguous.
        absmax: float32 (blocks,).
        codebook: float32 (256,).
        bias: (out,), of any of these dtypes, or None.
        block_size: weights a block of the flattened codes.

    Returns:
        (rows, out) in the dtype of x: float32 products and sums of weights that are not rounded to
        the dtype of x before, unlike those of a restored matrix.

    Raises:
        ValueError: for more than `MAX_ROWS` rows, or shapes that do not fit each other.
    """
    out_features, in_features = codes.shape
    rows = x.shape[0]
    if x.shape != (rows, in_features) or (bias is not None and bias.shape != (out_features,)):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, bias {bias if bias is None else tuple(bias.shape)}; "
            f"a weight of {out_features} x {in_features} does not fit them"
        )
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows; at most {MAX_ROWS} are multiplied without restoring")
    _check(codes, absmax, codebook, block_size)
    out = x.new_empty(rows, out_features)
    if not out.numel():
        return out
    width, one_scale = _tile_width(in_features, block_size)
    loaded = _load()
    with torch.cuda.device_of(codes):
        loaded.linear[lambda given: (-(-out_features // (given["TILE"] // width)),)](
            x.contiguous(),
            codes,
            absmax,
            codebook,
            # An address is needed even where nothing is read from it.
            codebook if bias is None else bias.contiguous(),
            _as_bits(out),
            rows,
            out_features,
            IN=in_features,
            BLOCK_SIZE=block_size,
            WIDTH=width,
            ONE_SCALE=one_scale,
            HAS_BIAS=bias is not None,
            ROWS=1 << (rows - 1).bit_length(),
            **loaded.untuned,
        )
    return out


# --------------------------------------------------------------------------------------------------
# The kernels. `_load` hands them to Triton; until then they are plain functions. Their arguments
# are addresses, and numbers known when they are compiled in capitals.


def _rounding_store(address, values, mask):  # type: ignore[no-untyped-def]
    """Store float32 values, rounded to nearest even, in float32 or float16, or, where the address
    is of int16, as the bits of bfloat16."""
    if address.dtype.element_ty == tl.int16:
        # By hand: GPUs before capability 8.0 have no instruction for it, and Triton's interpreter
        # cuts bits off where it should round. Exact for all but NaN, which no weight is.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # NaN of a sum with an infinite x: rounded up, its bits could become those of zero.
        nearest = tl.where(values == values, nearest, 0x7FC0)
        tl.store(address, nearest.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(address, values.to(address.dtype.element_ty), mask=mask)


def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes, absmax, codebook, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """A program restores TILE weights in a row."""
    first = tl.program_id(0).to(tl.int64) * TILE
    offset = tl.arange(0, TILE)
    valid = first + offset < n
    code = tl.load(codes + first + offset, mask=valid, other=0, eviction_policy="evict_first")
    value = tl.load(codebook + code.to(tl.int32), eviction_policy="evict_last")
    if BLOCK_SIZE % TILE == 0:
        scale = tl.load(absmax + first // BLOCK_SIZE)
    else:
        within = (first % BLOCK_SIZE).to(tl.int32) + offset
        scale = tl.load(absmax + first // BLOCK_SIZE + within // BLOCK_SIZE, mask=valid, other=0.0)
    _store_rounded(out + first + offset, value * scale, valid)


def _linear_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    absmax,
    codebook,
    bias,
    out,
    rows,
    out_features,
    IN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """x (rows, IN), padded to ROWS; a program computes TILE / WIDTH columns of out (rows, out).

    All that has a number for each weight has shape (1, HEIGHT, WIDTH) from its load on: threads
    then hold weights where they hold their sums (ROWS, HEIGHT, WIDTH), and nothing but codes has to
    change places.
    """
    HEIGHT: tl.constexpr = TILE // WIDTH
    output = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    real = output < out_features
    first = output.to(tl.int64) * IN  # a matrix may have more than 2^31 weights
    row = tl.arange(0, ROWS)
    sums = tl.full((ROWS, HEIGHT, WIDTH), 0.0, tl.float32)
    for start in range(0, IN, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, None, :]
        valid = real[None, :, None] & (column < IN)
        # Codes pass through the caches once; the codebook must not be evicted by them.
        code = tl.load(
            codes + first[None, :, None] + column,
            mask=valid,
            other=0,
            eviction_policy="evict_first",
        )
        value = tl.load(codebook + code.to(tl.int32), eviction_policy="evict_last")
        if ONE_SCALE:
            scale = tl.load(absmax + (first + start) // BLOCK_SIZE, mask=real, other=0.0)
            value *= scale[None, :, None]
        else:
            # (first + column) // BLOCK_SIZE, with a division in 32 bits for each weight.
            within = (first % BLOCK_SIZE).to(tl.int32)[None, :, None] + column
            block = absmax + (first // BLOCK_SIZE)[None, :, None] + within // BLOCK_SIZE
            value *= tl.load(block, mask=valid, other=0.0)
        part = tl.load(
            x + row[:, None, None] * IN + column,
            mask=(row < rows)[:, None, None] & (column < IN),
            other=0.0,
        )
        sums += value * part.to(tl.float32)
    result = tl.sum(sums, axis=2)
    if HAS_BIAS:
        result += tl.load(bias + output, mask=real, other=0.0).to(tl.float32)[None, :]
    address = out + row.to(tl.int64)[:, None] * out_features + output[None, :]
    _store_rounded(address, result, (row < rows)[:, None] & real[None, :])


# --------------------------------------------------------------------------------------------------


class _Loaded(NamedTuple):
    """The kernels as Triton launches them.

    Attributes:
        untuned: for `linear`, what its tuner chooses, where there is no tuner.
    """

    dequantize: Any
    linear: Any
    untuned: dict[str, int]


@functools.cache
def _load() -> _Loaded:
    """Import Triton and hand the kernels over, compiled or interpreted as TRITON_INTERPRET says."""
    global tl, _store_rounded
    import triton
    import triton.language

    tl = triton.language
    _store_rounded = triton.jit(_rounding_store)
    restore = triton.jit(_dequantize_kernel)
    multiply = triton.jit(_linear_kernel, do_not_specialize=["rows"])
    if _interpreter_wanted():
        return _Loaded(restore, multiply, {"TILE": _TILES[0][0]})
    tuned = triton.autotune(
        [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in _TILES],
        key=["out_features", "IN", "BLOCK_SIZE", "ROWS"],
        prune_configs_by={"early_config_prune": _that_fit},
    )
    return _Loaded(restore, tuned(multiply), {})


def _that_fit(configs: list[Any], given: dict[str, Any], **others: Any) -> list[Any]:
    """Return the configurations whose sums leave a thread registers for something else."""
    rows = {**given, **others}["ROWS"]
    return [
        config
        for config in configs
        if rows * config.kwargs["TILE"] // (32 * config.num_warps) <= _SUMS_A_THREAD
    ]


@functools.cache
def _works(kind: str, index: int | None) -> bool:
    """Whether Triton is there, can compile for the device, and restores a small tensor rightly.

    It needs a C compiler when it first launches a kernel, and new versions drop old GPUs.
    """
    if kind == "cuda" and torch.cuda.get_device_capability(index) < _OLDEST_CAPABILITY:
        return False
    try:
        import triton
        import triton.language
    except ImportError:
        return False
    # Triton's own functions were interpreted or not when it was imported; kernels must match them.
    if _interpreter_wanted() == isinstance(triton.language.sum, triton.runtime.JITFunction):
        _logger.warning("TRITON_INTERPRET was changed after Triton was imported; it is not used")
        return False
    device = torch.device(kind if index is None else f"{kind}:{index}")
    codes = (torch.arange(3000, device=device) % 256).to(torch.uint8)
    absmax = torch.linspace(0.1, 3.0, 47, device=device)
    arguments = (codes, absmax, torch.linspace(-1.0, 1.0, 256, device=device), 64, torch.bfloat16)
    try:
        agree = torch.equal(dequantize(*arguments), reference.dequantize(*arguments))
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        _logger.warning("Triton's kernels do not work on %s and are not used: %s", device, error)
        return False
    if not agree:
        _logger.warning("Triton's kernels disagree with the reference on %s, not used", device)
    return agree


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _tile_width(in_features: int, block_size: int) -> tuple[int, bool]:
    """Return a power of two, and whether no block ends inside a tile of that many columns.

    Blocks begin and end, in any row, at multiples of gcd(in, block_size) only.
    """
    run = math.gcd(in_features, block_size)
    width = min(run & -run, _WIDEST)
    if width >= _NARROWEST:
        return width, True
    return min(max(1 << (in_features - 1).bit_length(), _NARROWEST), _WIDEST), False


def _as_bits(out: torch.Tensor) -> torch.Tensor:
    """bfloat16 is stored as integers; see `_rounding_store`."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


def _check(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> None:
    """A kernel reads what it is told to: what follows would be wrong numbers, or a crash."""
    assert codes.is_contiguous() and codes.dtype == torch.uint8
    assert absmax.is_contiguous() and absmax.dtype == torch.float32
    assert absmax.numel() == -(-codes.numel() // block_size)
    assert codebook.is_contiguous() and codebook.shape == (256,)
    assert codebook.dtype == torch.float32
