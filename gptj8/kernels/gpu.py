"""Triton kernels for NVIDIA GPUs that restore weights or multiply directly from the codes.

    dequantize  w = codebook[codes] * absmax, rounded to nearest in the output dtype
    linear      y = x W^T + b for few rows of x, as in decoding: reads one byte per weight, looks it
                up and multiplies it in registers, and writes only y

Writing W in 16 bits and reading it back would move five bytes per weight instead of one, and with
few rows memory traffic is the bottleneck. With more rows the multiplications dominate, and torch's
product with the restored matrix is faster. `linear` therefore accepts at most `MAX_ROWS` rows.

The codec treats a matrix (out, in) as one row of out * in numbers, so a block may span several
matrix rows or end inside one. `linear` processes the rows in tiles. If no block can end inside a
row of a tile, one absmax is loaded per tile row; otherwise one is loaded per weight.

Products are summed in float32 registers, with one partial sum per row of x and weight of a tile,
and the partial sums are reduced at the end.

Alternatives considered; these judgements are based on the compiled code, not on timings:

- Tensor cores for two or more rows. They always multiply 16 rows, and need weights rounded to 16
  bits and compute capability 8.0. Triton's pipeline for them moves every lookup through shared
  memory; without it, a matrix of 4096 rows gives too few programs to saturate the memory of a large
  GPU.
- Decoding codebooks of lines (`gptj8.quantization.codebooks`) with arithmetic, as the CPU kernels
  do. On compute capabilities 7.5 to 9.0 `linear` with one row takes 7.7 to 8.0 instructions per
  weight with the lookup, 10.1 to 10.3 with one warp shuffle per weight in its place, and 13.5 to
  13.8 with byte permutations in registers; with 8 rows 18, 20 and 23 to 24; `dequantize` 12 to 13,
  15 to 16 and 18 to 19. Both use 96 registers instead of 72 with one row. The shuffle also relies
  on lanes that hold different values of what Triton takes for one. `benchmarks.gpu_code` prints the
  figures.

The module can be imported without Triton, and nothing is compiled before the first call. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly; they are tested this way on machines
without a GPU.
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
_DEQUANTIZE_TILE = 1024  # weights per program; they share one absmax if blocks are at least as long

# Columns per tile: at most 16 bytes per thread of a warp, and enough to make a load worthwhile.
_WIDEST, _NARROWEST = 512, 64

# (weights per tile, warps per program). The list is short because each entry is compiled and timed
# at the first call with a new shape.
_TILES = ((4096, 4), (4096, 8), (2048, 4), (2048, 8), (1024, 4))
_SUMS_PER_THREAD = 128  # float32 sums; a thread has at most 255 registers

# Set by `_load`, like `tl`: Triton resolves the names in a kernel in the globals of its module.
_store_rounded: Any = None

_logger = logging.getLogger(__name__)


def is_available(device: torch.device) -> bool:
    """Return whether the kernels work on a device; tested once per device, on a small tensor.

    They require compute capability 7.0 or newer, or a CPU with TRITON_INTERPRET=1.
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
    """Return codebook[codes] * absmax, bit-identical to `reference.dequantize`.

    Args:
        codes: uint8, contiguous, any shape.
        absmax: float32 (blocks,).
        codebook: float32 (256,).
        block_size: weights per block.
        dtype: float32, float16 or bfloat16.
        out: tensor to write the result to; contiguous, with `dtype` and the shape and device of
            the codes.

    Returns:
        `out`, or a new tensor with `dtype` and the shape and device of the codes.
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
    """Return x W^T + bias for the quantized matrix W, without restoring it.

    Args:
        x: (rows, in), float32, float16 or bfloat16; at most `MAX_ROWS` rows.
        codes: uint8 (out, in), contiguous.
        absmax: float32 (blocks,).
        codebook: float32 (256,).
        bias: (out,), with one of the dtypes of x, or None.
        block_size: weights per block of the flattened codes.

    Returns:
        (rows, out) in the dtype of x. Products and sums are float32, and the weights are not
        rounded to the dtype of x first, unlike those of a restored matrix.

    Raises:
        ValueError: if x has more than `MAX_ROWS` rows or the shapes do not match.
    """
    out_features, in_features = codes.shape
    rows = x.shape[0]
    if x.shape != (rows, in_features) or (bias is not None and bias.shape != (out_features,)):
        raise ValueError(
            f"shapes do not match: x {tuple(x.shape)}, "
            f"bias {bias if bias is None else tuple(bias.shape)}, "
            f"weight ({out_features}, {in_features})"
        )
    if rows > MAX_ROWS:
        raise ValueError(f"x has {rows} rows; at most {MAX_ROWS} can be multiplied from the codes")
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
            # The kernel needs an address even if it reads nothing from it.
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
# The kernels. They are plain functions until `_load` passes them to Triton. Tensor arguments are
# addresses; arguments in capitals are compile-time constants.


def _rounding_store(address, values, mask):  # type: ignore[no-untyped-def]
    """Store float32 values, rounded to nearest even, as float32 or float16.

    If the address is int16, the bits of bfloat16 are stored.
    """
    if address.dtype.element_ty == tl.int16:
        # bfloat16 is rounded with integers: GPUs before capability 8.0 have no instruction for it,
        # and Triton's interpreter truncates instead of rounding.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A sum with an infinite x may be NaN, and rounding up can turn the bits of NaN into zero.
        nearest = tl.where(values == values, nearest, 0x7FC0)
        tl.store(address, nearest.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(address, values.to(address.dtype.element_ty), mask=mask)


def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes, absmax, codebook, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """Restore TILE consecutive weights per program."""
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
    """Multiply x (rows, IN), padded to ROWS; a program computes TILE / WIDTH columns of the output.

    Every tensor with one value per weight is loaded with shape (1, HEIGHT, WIDTH). Each thread then
    holds the weights that belong to its sums (ROWS, HEIGHT, WIDTH), and only codes have to be
    exchanged between threads.
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
        # Each code is used once, so codes must not evict the codebook from the caches.
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
            # (first + column) // BLOCK_SIZE, but with a 32-bit division per weight.
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
    """The kernels in a form that Triton can launch.

    Attributes:
        untuned: extra arguments of `linear` that the autotuner would otherwise choose.
    """

    dequantize: Any
    linear: Any
    untuned: dict[str, int]


@functools.cache
def _load() -> _Loaded:
    """Import Triton and pass it the kernels; TRITON_INTERPRET selects the interpreter."""
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
        prune_configs_by={"early_config_prune": _prune_configs},
    )
    return _Loaded(restore, tuned(multiply), {})


def _prune_configs(configs: list[Any], given: dict[str, Any], **others: Any) -> list[Any]:
    """Return the configurations whose sums leave enough registers free in each thread."""
    rows = {**given, **others}["ROWS"]
    return [
        config
        for config in configs
        if rows * config.kwargs["TILE"] // (32 * config.num_warps) <= _SUMS_PER_THREAD
    ]


@functools.cache
def _works(kind: str, index: int | None) -> bool:
    """Return whether Triton is installed and restores a small tensor correctly on the device.

    This can fail because Triton needs a C compiler at its first launch, and because new versions
    drop support for old GPUs.
    """
    if kind == "cuda" and torch.cuda.get_device_capability(index) < _OLDEST_CAPABILITY:
        return False
    try:
        import triton
        import triton.language
    except ImportError:
        return False
    # Triton reads TRITON_INTERPRET for its own functions at import time. These kernels must use the
    # same mode.
    if _interpreter_wanted() == isinstance(triton.language.sum, triton.runtime.JITFunction):
        _logger.warning(
            "Triton's kernels are not used: TRITON_INTERPRET was changed after Triton was imported"
        )
        return False
    device = torch.device(kind if index is None else f"{kind}:{index}")
    codes = (torch.arange(3000, device=device) % 256).to(torch.uint8)
    absmax = torch.linspace(0.1, 3.0, 47, device=device)
    arguments = (codes, absmax, torch.linspace(-1.0, 1.0, 256, device=device), 64, torch.bfloat16)
    try:
        agree = torch.equal(dequantize(*arguments), reference.dequantize(*arguments))
    except Exception as error:  # compilers, linkers and drivers may raise anything
        _logger.warning("Triton's kernels do not work on %s and are not used: %s", device, error)
        return False
    if not agree:
        _logger.warning(
            "Triton's kernels disagree with the reference on %s and are not used", device
        )
    return agree


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _tile_width(in_features: int, block_size: int) -> tuple[int, bool]:
    """Return the columns per tile, a power of two, and whether no block ends inside a tile.

    In every row, blocks can only begin and end at multiples of gcd(in, block_size).
    """
    run = math.gcd(in_features, block_size)
    width = min(run & -run, _WIDEST)
    if width >= _NARROWEST:
        return width, True
    return min(max(1 << (in_features - 1).bit_length(), _NARROWEST), _WIDEST), False


def _as_bits(out: torch.Tensor) -> torch.Tensor:
    """Return `out`, viewed as int16 if it is bfloat16; see `_rounding_store`."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


def _check(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> None:
    """Check the arguments: a kernel reads memory unchecked and would return garbage or crash."""
    assert codes.is_contiguous() and codes.dtype == torch.uint8
    assert absmax.is_contiguous() and absmax.dtype == torch.float32
    assert absmax.numel() == -(-codes.numel() // block_size)
    assert codebook.is_contiguous() and codebook.shape == (256,)
    assert codebook.dtype == torch.float32
