"""Compare the compiled CPU kernels with the torch reference, bit for bit."""

import importlib.machinery
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptj8.kernels import cpu, dispatch, reference
from gptj8.quantization.codebooks import dynamic_codebook, fit_codebook
from gptj8.quantization.codec import (
    QuantizationError,
    dequantize_blockwise,
    quantize_blockwise,
)
from gptj8.quantization.scales import encode_scales, fit_levels
from tests.helpers.paths import ROOT

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

compiled = pytest.mark.skipif(
    cpu.library() is None and shutil.which("cc") is None, reason="needs a C compiler"
)


def some_weights(dtype: torch.dtype, n: int) -> torch.Tensor:
    """Return random weights that include zeros and subnormals, with complete blocks of each."""
    weights = torch.randn(n, generator=torch.Generator().manual_seed(n))
    weights[::7] = 0.0
    weights[1::11] *= 1e-6
    if n > 12_000:
        weights[4096:8192] = 0.0
        weights[8192:12_288] *= torch.finfo(dtype).tiny / 8
    return weights.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, to distinguish -0 from 0."""
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@compiled
def test_kernels_are_compiled_if_a_compiler_is_available():
    assert cpu.library() is not None
    assert dispatch.describe(torch.device("cpu")).startswith("compiled kernels (")


@compiled
@pytest.mark.parametrize("n", [1, 255, 4096, 50_001])
@pytest.mark.parametrize("block_size", [32, 64, 512, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_are_bit_identical_to_the_reference(dtype, block_size, n, threads):
    flat = some_weights(dtype, n)
    absmax = reference.absmax(flat, block_size)
    assert torch.equal(cpu.absmax(flat, block_size), absmax)

    block_mass = (absmax.double() * 1000).round()
    mass = reference.histogram(flat, absmax, block_mass, block_size, 1 << 15)
    assert torch.equal(cpu.histogram(flat, absmax, block_mass, block_size, 1 << 15), mass)

    for codebook in (dynamic_codebook(), fit_codebook(mass), torch.linspace(-1, 1, 256)):
        boundaries = reference.exact_midpoints(codebook)
        codes = reference.encode(flat, absmax, boundaries, block_size)
        assert torch.equal(cpu.encode(flat, absmax, boundaries, block_size), codes)

        levels = fit_levels(absmax)
        lowest = encode_scales(absmax, levels)
        found = [
            module.search_levels(
                flat, lowest, levels, reference.nearest_values(codebook), block_size, 8
            )
            for module in (cpu, reference)
        ]
        assert torch.equal(*found)

        for out in DTYPES:
            restored = reference.dequantize(codes, absmax, codebook, block_size, out)
            ours = cpu.dequantize(codes, absmax, codebook, block_size, out)
            assert torch.equal(bits(ours), bits(restored))
            coded, levels = (absmax * 50).to(torch.uint8), torch.linspace(1e-6, 5.0, 256)
            restored = reference.dequantize(codes, coded, codebook, block_size, out, levels)
            ours = cpu.dequantize(codes, coded, codebook, block_size, out, levels=levels)
            assert torch.equal(bits(ours), bits(restored))

        sums = reference.squared_errors(flat, codes, absmax, codebook, block_size)
        for ours, theirs in zip(
            cpu.squared_errors(flat, codes, absmax, codebook, block_size), sums, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@compiled
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not-aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_streaming_stores_match_the_reference(offset, dtype, block_size):
    """From 2^24 weights on, the output bypasses the caches if its memory is aligned."""
    n = (1 << 24) + 777
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8)
    absmax, codebook = torch.rand(-(-n // block_size)), torch.linspace(-1, 1, 256)
    out = torch.empty(n + 1, dtype=dtype)[offset : offset + n]
    cpu.dequantize(codes, absmax, codebook, block_size, dtype, out)
    expected = reference.dequantize(codes, absmax, codebook, block_size, dtype)
    assert torch.equal(out, expected)


@compiled
def test_encode_handles_many_boundaries_in_one_cell():
    # The codebook puts 128 boundaries into one cell of the kernel's table.
    codebook = torch.cat([torch.linspace(0, 1e-5, 128), torch.linspace(0.5, 1, 128)])
    flat = torch.cat([torch.linspace(0, 1.2e-5, 4095), torch.ones(1)])
    absmax, boundaries = reference.absmax(flat, 4096), reference.exact_midpoints(codebook)
    codes = cpu.encode(flat, absmax, boundaries, 4096)
    assert torch.equal(codes, reference.encode(flat, absmax, boundaries, 4096))
    assert codes.unique().numel() > 128


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [512, 4096])
def test_all_16_bit_values_and_ties_round_like_torch(dtype, block_size):
    # Each block's absmax is a 16-bit value or the midpoint of two, multiplied by a codebook value
    # of 1 or -1.
    values = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    between = ((values[1:].double() + values[:-1].double()) / 2).float()
    absmax = torch.cat([values, between, torch.nextafter(between, torch.tensor(math.inf))])
    absmax = torch.cat([absmax, torch.tensor([65519.0, 65520.0, 1e30, 3.4e38])])
    codebook = torch.linspace(-1, 1, 256)
    for code in (0, 255):  # -1 and 1
        codes = torch.full((len(absmax) * block_size,), code, dtype=torch.uint8)
        pieces = [slice(at, at + 2048) for at in range(0, len(absmax), 2048)]
        for piece in pieces:
            part = absmax[piece].contiguous()
            ours = cpu.dequantize(
                codes[: len(part) * block_size], part, codebook, block_size, dtype
            )
            expected = (part * codebook[code]).to(dtype)
            assert torch.equal(bits(ours[::block_size]), bits(expected))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_absmax_is_not_finite_if_a_weight_is_not(dtype, value):
    flat = torch.ones(200, dtype=dtype)
    flat[70] = value
    assert cpu.absmax(flat, 64).isfinite().tolist() == [True, False, True, True]


@compiled
@pytest.mark.parametrize("reach", [1.2e6, 1e7, 1e10])
def test_encode_with_a_codebook_beyond_one_matches_the_reference(reach):
    codebook = torch.cat([torch.linspace(-1, 1, 255), torch.tensor([reach])])
    for table in (codebook, torch.linspace(-reach, reach, 256)):
        flat = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
        absmax, boundaries = reference.absmax(flat, 64), reference.exact_midpoints(table)
        codes = cpu.encode(flat, absmax, boundaries, 64)
        assert torch.equal(codes, reference.encode(flat, absmax, boundaries, 64))


@compiled
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize(
    ("out", "columns", "block_size"),
    [
        (33, 128, 4096),
        (50, 320, 256),
        (64, 4096, 4096),
        (7, 200, 64),
        (100, 192, 64),
        (100, 192, 32),
        (9, 200, 32),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)],
    ids=str,
)
def test_linear_from_codes_is_accurate(dtype, tolerance, out, columns, block_size, rows):
    torch.manual_seed(rows)
    q = quantize_blockwise(torch.randn(out, columns), block_size)
    x = torch.randn(rows, columns).to(dtype)
    weight = reference.dequantize(q.codes, q.absmax, q.codebook, block_size, torch.float64)
    exact = x.double() @ weight.t()
    ours = dispatch.multiply(x, q.codes, q.absmax, q.codebook, block_size)
    assert ours.dtype == dtype
    assert float((ours.double() - exact).norm() / exact.norm()) < tolerance
    q = quantize_blockwise(torch.randn(out, columns), block_size, scale_bits=8)
    exact = x.double() @ dequantize_blockwise(q).double().t()
    ours = dispatch.multiply(x, q.codes, q.absmax, q.codebook, block_size, q.levels)
    assert float((ours.double() - exact).norm() / exact.norm()) < tolerance


@compiled
def test_mismatched_tensors_raise_before_the_kernel_is_called():
    q = quantize_blockwise(torch.randn(96, 64), 64)
    parts = {"codes": q.codes, "absmax": q.absmax, "codebook": q.codebook}
    wrong = [
        {"absmax": q.absmax[:3]},
        {"absmax": q.absmax.half()},
        {"codebook": q.codebook[:255]},
        {"codebook": q.codebook.double()},
        {"codes": q.codes.int()},
        {"codes": q.codes.to("meta")},
    ]
    for change in wrong:
        with pytest.raises(QuantizationError, match=r"a tensor (is|has) "):
            cpu.dequantize(**(parts | change), block_size=64, dtype=torch.bfloat16)
        with pytest.raises(QuantizationError, match=r"a tensor (is|has) "):
            cpu.multiply(
                torch.randn(2, 64), **(parts | change), block_size=64, levels=None, across=False
            )


@pytest.mark.slow
@pytest.mark.parametrize("replacement", ["missing", "other-interface", "wrong-results"])
def test_results_are_the_same_without_usable_kernels(replacement, tmp_path):
    if replacement != "missing" and shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    package = tmp_path / "gptj8"
    shutil.copytree(ROOT / "gptj8", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if replacement != "missing":
        name, right, wrong = {
            "wrong-results": ("quantize.c", "code[i] = at;", "code[i] = at / 2;"),
            "other-interface": ("machine.c", "#define INTERFACE ", "#define INTERFACE 9"),
        }[replacement]
        changed = package / "kernels" / "c" / name
        source = changed.read_text()
        assert right in source
        changed.write_text(source.replace(right, wrong))
        suffix = next(iter(importlib.machinery.EXTENSION_SUFFIXES))
        library = package / "kernels" / f"_cpu_kernels{suffix}"
        sources = sorted(changed.parent.glob("*.c"))
        command = ["cc", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fopenmp", "-o", library]
        subprocess.run([*command, *sources], check=True)
    script = (
        "import torch, gptj8; from gptj8.kernels import dispatch;"
        "torch.manual_seed(0); q = gptj8.quantize_blockwise(torch.randn(99, 100), 64);"
        "print(dispatch.describe(torch.device('cpu')), q.codes.long().sum().item(),"
        "q.codebook.double().sum().item(),"
        "gptj8.dequantize_blockwise(q, torch.bfloat16).double().sum().item(), sep='|')"
    )
    here = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True
    )
    there = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert here.stdout.startswith("compiled kernels") or shutil.which("cc") is None
    assert there.stdout.startswith("bitsandbytes' operator")
    assert here.stdout.split("|")[1:] == there.stdout.split("|")[1:]
    assert ("disagree" in there.stderr) == (replacement == "wrong-results")


def test_dequantize_on_cuda_writes_to_out():
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    dispatch._bitsandbytes()  # its import creates tensors, which must not be recorded
    with FakeTensorMode():  # CUDA tensors without a GPU
        codes = torch.empty(3, 4096, dtype=torch.uint8, device="cuda")
        absmax, codebook = torch.empty(3, device="cuda"), torch.empty(256, device="cuda")
        out = torch.empty(3, 4096, dtype=torch.bfloat16, device="cuda")
        with Recorder():
            restored = dispatch.dequantize(codes, absmax, codebook, 4096, torch.bfloat16, out)
    assert restored is out
    assert names == ["bitsandbytes::dequantize_blockwise.out"]


DECOY = """
#include <stdio.h>
__attribute__((constructor)) static void mark(void) { fclose(fopen("loaded", "w")); }
int gptj8_interface(void) { return %d; }
"""


@compiled
def test_a_library_in_the_working_directory_is_not_loaded(tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / "decoy.c").write_text(DECOY % cpu._INTERFACE)
    for folder in ("gptj8", "gptj8/kernels"):
        (tmp_path / folder).mkdir()
        library = tmp_path / folder / f"_cpu_kernels{suffix}"
        command = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "decoy.c"]
        subprocess.run(command, check=True)
    script = "from gptj8.kernels import cpu; print(cpu.library()._name)"
    for options in ((), ("-P",)):  # with and without the working directory on sys.path
        found = subprocess.run(
            [sys.executable, *options, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            check=True,
        )
        assert Path(found.stdout.strip()).is_relative_to(ROOT / "gptj8" / "kernels")
    assert not (tmp_path / "loaded").exists()
