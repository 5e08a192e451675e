"""`gptj8.blockwise` in C for CPUs, from `cpu_kernels.c`; absent where it was not compiled.

Installing the package compiles the file if there is a compiler. It needs no headers of torch or
Python: tensors are handed over as addresses, by ctypes, which lets other threads run meanwhile. The
library uses OpenMP as torch does, and so the threads that torch already has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import torch

# Must equal INTERFACE in cpu_kernels.c: a library of an older source tree is not used.
_INTERFACE = 1
_CELLS = 4096
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library; None if there is none for this machine and source."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(f"_cpu_kernels{suffix}")
        if file.is_file():
            try:
                loaded = ctypes.CDLL(str(file))
                if loaded.gptj8_interface() == _INTERFACE:
                    return loaded
            except (OSError, AttributeError):  # of another machine, or something else of that name
                continue
    return None


def absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """See `blockwise.absmax`."""
    found = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32)
    _call("absmax", flat, _DTYPES[flat.dtype], flat.numel(), block_size, found)
    return found


def histogram(
    flat: torch.Tensor,
    absmax: torch.Tensor,
    block_mass: torch.Tensor,
    block_size: int,
    bins: int,
) -> torch.Tensor:
    """See `blockwise.histogram`."""
    mass = torch.zeros(torch.get_num_threads(), bins, dtype=torch.float64)
    dtype = _DTYPES[flat.dtype]
    _call("histogram", flat, dtype, flat.numel(), block_size, absmax, block_mass, mass, bins)
    return mass.sum(0)


def encode(
    flat: torch.Tensor, absmax: torch.Tensor, boundaries: torch.Tensor, block_size: int
) -> torch.Tensor:
    """See `blockwise.encode`."""
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    # In which of equal cells over [-1, 1] each boundary lies, computed as the kernel computes it
    # for a weight; that is monotone, so boundaries in lower cells are below the weight.
    cells = ((boundaries + 1.0) * (_CELLS / 2)).to(torch.int32)
    every = torch.arange(_CELLS + 1, dtype=torch.int32)
    first = torch.searchsorted(cells, every, out_int32=True)
    padded = torch.cat([boundaries, torch.tensor([torch.inf])])
    dtype = _DTYPES[flat.dtype]
    _call("encode", flat, dtype, flat.numel(), block_size, absmax, padded, first, codes)
    return codes


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.dequantize`."""
    out = torch.empty(codes.shape, dtype=dtype) if out is None else out
    _call("dequantize", codes, codes.numel(), block_size, absmax, codebook, out, _DTYPES[dtype])
    return out


def squared_errors(
    flat: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `blockwise.squared_errors`."""
    errors, norms = torch.empty(2, absmax.numel(), dtype=torch.float64)
    dtype, n = _DTYPES[flat.dtype], flat.numel()
    _call("squared_errors", flat, dtype, n, block_size, codes, absmax, codebook, errors, norms)
    return errors, norms


def _call(name: str, *arguments: torch.Tensor | int) -> None:
    """Call a function of the library with tensors as addresses and the number of threads last."""
    loaded = library()
    assert loaded is not None
    converted: list[ctypes.c_void_p | ctypes.c_int64] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous() and argument.device.type == "cpu"
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            converted.append(ctypes.c_int64(argument))
    threads = ctypes.c_int64(torch.get_num_threads())
    getattr(loaded, f"gptj8_{name}")(*converted, threads)
