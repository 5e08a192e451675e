"""The kernels for 64-bit ARM, compiled by a cross compiler and run in an emulator."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from gptj8.kernels import cpu, reference
from gptj8.quantization.codec import quantize_blockwise
from tests.helpers.paths import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
SOURCES = sorted((ROOT / "gptj8" / "kernels" / "c").glob("*.c"))
FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR}",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    made = tmp_path_factory.mktemp("neon") / "driver"
    driver = ROOT / "tests" / "kernels" / "driver.c"
    command = [COMPILER, *FLAGS, "-Werror", "-static", "-o", made, *SOURCES, driver, "-lm"]
    subprocess.run(command, check=True)
    return made


def run(program, q, rows, threads):
    """Return the instruction set, the restored weights, x, y and the two products of a run."""
    out, columns = q.codes.shape
    torch.manual_seed(rows)
    x, y = torch.randn(rows, columns), torch.randn(rows, out)
    sizes = torch.tensor([out, columns, q.block_size, q.levels is not None, rows, threads])
    parts = [sizes, q.codes, q.absmax, q.levels, q.codebook, x, y]
    given = b"".join(part.numpy().tobytes() for part in parts if part is not None)
    found = subprocess.run([EMULATOR, program], input=given, capture_output=True, check=True).stdout
    isa, found = np.frombuffer(found[:8], dtype=np.int64)[0], found[8:]
    arrays = []
    for shape, dtype in (
        *(((out, columns), dtype) for dtype in cpu.DTYPES),
        ((rows, out), torch.float32),
        ((rows, columns), torch.float32),
    ):
        size = shape[0] * shape[1] * dtype.itemsize
        if not found:
            break
        arrays.append(torch.frombuffer(bytearray(found[:size]), dtype=dtype).view(shape))
        found = found[size:]
    assert not found
    return cpu.INSTRUCTION_SETS[isa], arrays[:3], x, y, arrays[3:]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 19, 33])
@pytest.mark.parametrize(
    ("out", "columns", "block_size", "bits"),
    [(7, 64, 64, 8), (131, 576, 32, 8), (50, 1152, 128, 8), (13, 96, 4096, 32), (9, 100, 64, 8)],
)
@pytest.mark.parametrize("kind", ["fitted", "dynamic"])
def test_neon_restores_bit_for_bit_and_multiplies(
    program, kind, out, columns, block_size, bits, rows, threads
):
    torch.manual_seed(0)
    weight = torch.randn(out, columns)
    weight[0] *= 1e-30  # 16-bit weights of this row are subnormal or zero
    q = quantize_blockwise(weight, block_size, kind, scale_bits=bits)
    isa, restored, x, y, products = run(program, q, rows, threads)
    assert isa == "avx2"  # the place of NEON in the order
    for found, dtype in zip(restored, cpu.DTYPES, strict=True):
        expected = reference.dequantize(q.codes, q.absmax, q.codebook, block_size, dtype, q.levels)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    is_in_lines = kind == "fitted" and block_size <= 128
    assert bool(products) == (is_in_lines and columns % 32 == 0)
    exact = restored[0].double()
    for found, wanted in zip(products, (x.double() @ exact.t(), y.double() @ exact), strict=False):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6
