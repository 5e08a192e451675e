"""Compiled CPU version of `gptj8.kernels.reference`, written in C (`cpu_kernels.c`).

The file is compiled when the package is installed, if a C compiler is available. It needs no torch
or Python headers: tensors are passed as addresses through ctypes, which releases the GIL during the
call. Because C cannot check an address, `_Array` checks each tensor's dtype and size first. The
library uses OpenMP, like torch, and reuses torch's threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import torch

from gptj8.kernels import reference
from gptj8.runtime.errors import QuantizationError
from gptj8.runtime.project import copied_project

# Must equal INTERFACE in cpu_kernels.c. A library built from another version is not used.
_INTERFACE = 4
_CELLS = 4096
_ENTRIES = 256
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_ROWS = 8
# Waking a thread takes longer than processing fewer weights than this.
_WEIGHTS_PER_THREAD = 1 << 18


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if there is none for this machine and source version."""
    names = [f"_cpu_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    here = Path(__file__).resolve().parent
    # Queued DVC experiments run in copies of the project that hold only files tracked by git, so
    # the library is then loaded from the original. The working directory is never searched: files
    # there are not part of this package.
    original = copied_project(here)
    folders = [here, *([original / "gptj8" / "kernels"] if original else [])]
    for file in (folder / name for folder in folders for name in names):
        if file.is_file():
            try:
                loaded = ctypes.CDLL(str(file))
                if loaded.gptj8_interface() == _INTERFACE:
                    return loaded
            except (OSError, AttributeError):  # built for another machine, or an unrelated library
                continue
    return None


def absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the largest magnitude of each block; see `reference.absmax`."""
    n = flat.numel()
    found = torch.empty(_blocks(n, block_size), dtype=torch.float32, device="cpu")
    _call("absmax", n, _weights(flat), DTYPES[flat.dtype], n, block_size, _Array(found))
    return found


def histogram(
    flat: torch.Tensor,
    absmax: torch.Tensor,
    block_mass: torch.Tensor,
    block_size: int,
    bins: int,
) -> torch.Tensor:
    """Return a histogram of weights / absmax; see `reference.histogram`."""
    n, blocks = flat.numel(), _blocks(flat.numel(), block_size)
    mass = torch.zeros(torch.get_num_threads(), bins, dtype=torch.float64, device="cpu")
    _call(
        "histogram",
        n,
        _weights(flat),
        DTYPES[flat.dtype],
        n,
        block_size,
        _Array(absmax, torch.float32, blocks),
        _Array(block_mass, torch.float64, blocks),
        _Array(mass),
        bins,
    )
    return mass.sum(0)


def encode(
    flat: torch.Tensor, absmax: torch.Tensor, boundaries: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return the codes; see `reference.encode`."""
    n = flat.numel()
    codes = torch.empty(n, dtype=torch.uint8, device="cpu")
    # Divide [-1, 1] into equal cells and find the cell of each boundary with the kernel's formula
    # for weights. The formula is monotonic, so boundaries in lower cells are below the weight.
    cells = ((boundaries + 1.0) * (_CELLS / 2)).clamp(0, _CELLS + 1).to(torch.int32)
    every = torch.arange(_CELLS + 1, dtype=torch.int32, device="cpu")
    first = torch.searchsorted(cells, every, out_int32=True)
    padded = torch.cat([boundaries, boundaries.new_full((1,), torch.inf)])
    _call(
        "encode",
        n,
        _weights(flat),
        DTYPES[flat.dtype],
        n,
        block_size,
        _Array(absmax, torch.float32, _blocks(n, block_size)),
        _Array(padded, torch.float32, _ENTRIES),
        _Array(first, torch.int32, _CELLS + 1),
        _Array(codes),
    )
    return codes


def search_levels(
    flat: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor,
    nearest: torch.Tensor,
    block_size: int,
    candidates: int,
) -> torch.Tensor:
    """Return for each block the level with the smallest error; see `reference.search_levels`."""
    n, blocks = flat.numel(), _blocks(flat.numel(), block_size)
    best = torch.empty(blocks, dtype=torch.uint8, device="cpu")
    _call(
        "search_levels",
        n * candidates,
        _weights(flat),
        DTYPES[flat.dtype],
        n,
        block_size,
        _Array(absmax, torch.uint8, blocks),
        _Array(levels, torch.float32, _ENTRIES),
        _Array(nearest, torch.float32, reference.SEARCH_CELLS),
        candidates,
        _Array(best),
    )
    return best


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return codebook[codes] * absmax; see `dispatch.dequantize`."""
    n = codes.numel()
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device="cpu")
    _call(
        "dequantize",
        n,
        _Array(codes, torch.uint8, n),
        n,
        block_size,
        *_scales(absmax, levels, _blocks(n, block_size)),
        _Array(codebook, torch.float32, _ENTRIES),
        _Array(out, dtype, n),
        DTYPES[dtype],
    )
    return out


def squared_errors(
    flat: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared errors and squared norms per block; see `reference.squared_errors`."""
    n, blocks = flat.numel(), _blocks(flat.numel(), block_size)
    errors, norms = torch.empty(2, blocks, dtype=torch.float64, device="cpu")
    _call(
        "squared_errors",
        n,
        _weights(flat),
        DTYPES[flat.dtype],
        n,
        block_size,
        _Array(codes, torch.uint8, n),
        _Array(absmax, torch.float32, blocks),
        _Array(codebook, torch.float32, _ENTRIES),
        _Array(errors),
        _Array(norms),
    )
    return errors, norms


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T computed directly from the codes; see `dispatch.linear`."""
    rows, n, (out, columns) = x.numel() // x.shape[-1], codes.numel(), codes.shape
    in_bfloat16 = x.dtype == torch.bfloat16 and columns % 64 == 0 and _multiplies_bfloat16()
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    y = torch.empty(*x.shape[:-1], out, dtype=dtype, device="cpu")
    arguments: list[_Array | int | None] = [
        _Array(x.to(dtype), dtype, rows * columns),
        rows,
        _Array(codes, torch.uint8, n),
        out,
        columns,
        block_size,
        *_scales(absmax, levels, _blocks(n, block_size)),
        _Array(codebook, torch.float32, _ENTRIES),
        _Array(y),
    ]
    if in_bfloat16:
        _call(
            "linear_bfloat16",
            n,
            *arguments,
            _Array(torch.empty(rows * columns, dtype=dtype, device="cpu")),
        )
    else:
        _call("linear_float32", n, *arguments)
    return y.to(x.dtype)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return whether this machine supports the bfloat16 product."""
    loaded = library()
    return loaded is not None and bool(loaded.gptj8_multiplies_bfloat16())


class _Array:
    """A tensor argument of a kernel: contiguous, on the CPU, with the expected dtype and size."""

    def __init__(
        self, tensor: torch.Tensor, dtype: torch.dtype | None = None, size: int | None = None
    ) -> None:
        if tensor.device.type != "cpu" or (dtype is not None and tensor.dtype != dtype):
            raise QuantizationError(
                f"a tensor is {tensor.dtype} on {tensor.device}; the CPU kernel expects {dtype}"
            )
        if size is not None and tensor.numel() != size:
            raise QuantizationError(
                f"a tensor has {tensor.numel()} values (shape {tuple(tensor.shape)}); "
                f"the CPU kernel expects {size}"
            )
        self.tensor = tensor.contiguous()  # keeps a copy alive until the call returns


def _scales(
    absmax: torch.Tensor, levels: torch.Tensor | None, blocks: int
) -> tuple[_Array, _Array | None]:
    if levels is None:
        return _Array(absmax, torch.float32, blocks), None
    return _Array(absmax, torch.uint8, blocks), _Array(levels, torch.float32, _ENTRIES)


def _weights(flat: torch.Tensor) -> _Array:
    if flat.dtype not in DTYPES:
        raise QuantizationError(f"dtype {flat.dtype} is not float32, float16 or bfloat16")
    return _Array(flat)


def _blocks(n: int, block_size: int) -> int:
    return -(-n // block_size)


def _call(name: str, weights: int, *arguments: _Array | int | None) -> None:
    """Call a library function with tensors as addresses, and the number of threads as last
    argument.

    Args:
        name: the function's name without the prefix `gptj8_`.
        weights: number of weights to process; small tensors get fewer threads.
    """
    loaded = library()
    assert loaded is not None
    threads = min(torch.get_num_threads(), 1 + weights // _WEIGHTS_PER_THREAD)
    getattr(loaded, f"gptj8_{name}")(*map(_as_c, arguments), ctypes.c_int64(threads))


def _as_c(argument: _Array | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.tensor.data_ptr() if argument else None)
