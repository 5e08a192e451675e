"""Compiled CPU version of `gptj8.kernels.reference`, written in C (the folder `c`).

The files are compiled when the package is installed, if a C compiler is available. They need no
torch or Python headers: tensors are passed as addresses through ctypes, which releases the GIL
during the call. Because C cannot check an address, `_checked` checks each tensor's dtype and size
first. The library uses OpenMP, like torch, and reuses torch's threads.

One library has kernels for several instruction sets and uses the best that the machine has. The
environment variable `GPTJ8_CPU_ISA` limits it, for tests and measurements: `plain`, `avx2` (NEON on
ARM), `avx512`, `avx512_vbmi`.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.machinery
import os
from pathlib import Path

import torch

from gptj8.kernels import reference
from gptj8.runtime.errors import QuantizationError
from gptj8.runtime.project import copied_project

# Must equal INTERFACE in machine.c. A library built from another version is not used.
_INTERFACE = 5
_CELLS = 4096
_ENTRIES = 256
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Of products in bfloat16, and of those without kernels for the codebook or the shape.
MAX_ROWS = 8
INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_vbmi", "avx512_bf16")
LIMIT = "GPTJ8_CPU_ISA"
# With 16-bit inputs on a CPU with units for them: in vectors, and in tiles (AMX). Measured with
# matrices of 4096 x 4096 and 16384 x 4096 on two cores.
_MOST_16_BIT_ROWS = (32, 16)
# The library's functions, and how many arguments each of them has.
_ARGUMENTS = {
    "limit": 1,
    "instruction_set": 0,
    "multiplies_bfloat16": 0,
    "multiplies": 2,
    "most_rows": 1,
    "absmax": 6,
    "histogram": 9,
    "encode": 9,
    "search_levels": 10,
    "squared_errors": 10,
    "dequantize": 9,
    "product": 11,
    "product_transposed": 11,
    "product_plain": 11,
    "linear_bfloat16": 12,
}
# Waking a thread takes longer than processing fewer weights than this.
_WEIGHTS_PER_THREAD = 1 << 18


class Kind(enum.Enum):
    """A codebook whose values are unknown, because tensors are fake.

    Not a tensor of examples: under torch's FakeTensorMode its address could not be taken.
    """

    LINES = (ctypes.c_float * _ENTRIES)(*((code - 128) / 128 for code in range(_ENTRIES)))
    OTHER = (ctypes.c_float * _ENTRIES)(*(((code - 128) / 128) ** 3 for code in range(_ENTRIES)))

    @classmethod
    def of(cls, block_size: int) -> Kind:
        """Return the kind of a codebook that was fitted to blocks of this size."""
        return cls.LINES if block_size <= reference.LINES_BLOCK else cls.OTHER


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
                    return _declare(loaded)
            except (OSError, AttributeError):  # built for another machine, or an unrelated library
                continue
    return None


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions' arguments, which makes a call several times faster.

    Addresses are passed as integers; a 64-bit machine passes both in the same way.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError("the library needs a 64-bit machine")
    for name, count in _ARGUMENTS.items():
        function = getattr(loaded, f"gptj8_{name}")
        function.argtypes, function.restype = [ctypes.c_int64] * count, ctypes.c_int64
    loaded.gptj8_limit(_limit())
    return loaded


def _limit() -> int:
    """Return the best instruction set to use, as a position in `INSTRUCTION_SETS`."""
    name = os.environ.get(LIMIT) or INSTRUCTION_SETS[-1]
    if name not in INSTRUCTION_SETS:
        raise QuantizationError(f"{LIMIT} = {name!r} is not one of {', '.join(INSTRUCTION_SETS)}")
    return INSTRUCTION_SETS.index(name)


def instruction_set() -> str:
    """Return the name of the instruction set that the kernels use."""
    loaded = library()
    if loaded is None:
        return INSTRUCTION_SETS[0]
    return (
        INSTRUCTION_SETS[-1]
        if multiplies_bfloat16()
        else INSTRUCTION_SETS[loaded.gptj8_instruction_set()]
    )


def absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the largest magnitude of each block; see `reference.absmax`."""
    n = flat.numel()
    found = torch.empty(_blocks(n, block_size), dtype=torch.float32, device="cpu")
    _call("absmax", n, _weights(flat), DTYPES[flat.dtype], n, block_size, _checked(found))
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
        _checked(absmax, torch.float32, blocks),
        _checked(block_mass, torch.float64, blocks),
        _checked(mass),
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
        _checked(absmax, torch.float32, _blocks(n, block_size)),
        _checked(padded, torch.float32, _ENTRIES),
        _checked(first, torch.int32, _CELLS + 1),
        _checked(codes),
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
        _checked(absmax, torch.uint8, blocks),
        _checked(levels, torch.float32, _ENTRIES),
        _checked(nearest, torch.float32, reference.SEARCH_CELLS),
        candidates,
        _checked(best),
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
        _checked(codes, torch.uint8, n),
        n,
        block_size,
        *_scales(absmax, levels, _blocks(n, block_size)),
        _checked(codebook, torch.float32, _ENTRIES),
        _checked(out, dtype, n),
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
        _checked(codes, torch.uint8, n),
        _checked(absmax, torch.float32, blocks),
        _checked(codebook, torch.float32, _ENTRIES),
        _checked(errors),
        _checked(norms),
    )
    return errors, norms


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    block_size: int,
    levels: torch.Tensor | None,
    across: bool,
) -> torch.Tensor:
    """Return x W^T, or x W if `across`, from the codes; see `dispatch.multiply`."""
    n, (out, columns) = codes.numel(), codes.shape
    rows = x.numel() // max(1, x.shape[-1])
    if rows == 0:
        raise QuantizationError(f"no kernel multiplies no rows (shape {tuple(x.shape)})")
    kernels = multiplies(columns, codebook)
    in_bfloat16 = not across and kernels < 2 and _is_in_bfloat16(x, rows, columns)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    y = torch.empty(*x.shape[:-1], columns if across else out, dtype=dtype, device="cpu")
    arguments: list[torch.Tensor | int | None] = [
        _checked(x.to(dtype), dtype, rows * (out if across else columns)),
        rows,
        _checked(codes, torch.uint8, n),
        out,
        columns,
        block_size,
        *_scales(absmax, levels, _blocks(n, block_size)),
        _checked(codebook, torch.float32, _ENTRIES),
        _checked(y),
    ]
    if in_bfloat16:
        ordered = torch.empty(rows * columns, dtype=dtype, device="cpu")
        _call("linear_bfloat16", n, *arguments, _checked(ordered))
    elif not kernels:
        if across or rows > MAX_ROWS:
            raise QuantizationError(f"no kernel multiplies {rows} rows by this matrix")
        _call("product_plain", n, *arguments)
    else:
        _call("product_transposed" if across else "product", n * rows, *arguments)
    return y.to(x.dtype)


def multiplies(columns: int, codebook: torch.Tensor | Kind) -> int:
    """Return whether there are kernels for products with a matrix, for any number of rows.

    Args:
        columns: of the codes.
        codebook: float32 (256,), or its kind.

    Returns:
        2 if its codebook consists of lines, which are fastest, 1 for others, 0 without kernels.
    """
    loaded = library()
    if loaded is None:
        return 0
    if isinstance(codebook, Kind):
        return int(loaded.gptj8_multiplies(columns, ctypes.addressof(codebook.value)))
    table = _checked(codebook, torch.float32, _ENTRIES)
    return int(loaded.gptj8_multiplies(columns, table.data_ptr()))


def most_rows(x: torch.Tensor, columns: int, codebook: torch.Tensor | Kind, across: bool) -> int:
    """Return the most rows for which `multiply` is the fastest way, 0 if it is impossible.

    Args:
        x: a tensor with the dtype of the input.
        columns: of the codes.
        codebook: float32 (256,), or its kind.
        across: see `multiply`.
    """
    loaded = library()
    if loaded is None or x.dtype not in DTYPES:
        return 0
    plain = 0 if across else MAX_ROWS
    kernels = multiplies(columns, codebook)
    if x.dtype != torch.float32 and x.dtype in native_dtypes():
        # With more rows, restoring to 16 bits and multiplying in them is faster.
        return _MOST_16_BIT_ROWS[has_tiles(x.dtype)] if kernels == 2 else plain
    return max(plain, loaded.gptj8_most_rows(across)) if kernels else plain


@functools.cache
def native_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes in which this CPU multiplies; others are converted to float32 first."""
    has, found = torch.cpu.get_capabilities(), [torch.float32]
    if has.get("amx_bf16") or has.get("avx512_bf16"):
        found.append(torch.bfloat16)
    if has.get("amx_fp16") or has.get("avx512_fp16"):
        found.append(torch.float16)
    if _limit() < INSTRUCTION_SETS.index("avx512_bf16"):
        return tuple(found[:1])
    return tuple(found)


def has_tiles(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies tiles (AMX) of a 16-bit dtype."""
    name = "amx_bf16" if dtype == torch.bfloat16 else "amx_fp16"
    return bool(torch.cpu.get_capabilities().get(name))


def _is_in_bfloat16(x: torch.Tensor, rows: int, columns: int) -> bool:
    fits = rows <= MAX_ROWS and columns % 64 == 0
    return x.dtype == torch.bfloat16 and fits and multiplies_bfloat16()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this machine supports the product in bfloat16."""
    loaded = library()
    return loaded is not None and bool(loaded.gptj8_multiplies_bfloat16())


def _checked(
    tensor: torch.Tensor, dtype: torch.dtype | None = None, size: int | None = None
) -> torch.Tensor:
    """Return a tensor for a kernel: contiguous, on the CPU, with the expected dtype and size."""
    if tensor.device.type != "cpu" or (dtype is not None and tensor.dtype != dtype):
        raise QuantizationError(
            f"a tensor is {tensor.dtype} on {tensor.device}; the CPU kernel expects {dtype}"
        )
    if size is not None and tensor.numel() != size:
        raise QuantizationError(
            f"a tensor has {tensor.numel()} values (shape {tuple(tensor.shape)}); "
            f"the CPU kernel expects {size}"
        )
    return tensor.contiguous()


def _scales(
    absmax: torch.Tensor, levels: torch.Tensor | None, blocks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if levels is None:
        return _checked(absmax, torch.float32, blocks), None
    return _checked(absmax, torch.uint8, blocks), _checked(levels, torch.float32, _ENTRIES)


def _weights(flat: torch.Tensor) -> torch.Tensor:
    if flat.dtype not in DTYPES:
        raise QuantizationError(f"dtype {flat.dtype} is not float32, float16 or bfloat16")
    return _checked(flat)


def _blocks(n: int, block_size: int) -> int:
    return -(-n // block_size)


def _call(name: str, weights: int, *arguments: torch.Tensor | int | None) -> None:
    """Call a library function with tensors as addresses, and the number of threads as last
    argument.

    Args:
        name: the function's name without the prefix `gptj8_`.
        weights: number of weights to process, for each row that they are multiplied by; small
            tensors get fewer threads.
        arguments: checked tensors, integers, or None for an address of 0.
    """
    loaded = library()
    assert loaded is not None
    threads = min(torch.get_num_threads(), 1 + weights // _WEIGHTS_PER_THREAD)
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
    getattr(loaded, f"gptj8_{name}")(*values, threads)
