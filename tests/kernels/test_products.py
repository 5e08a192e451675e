"""Products directly from the codes, for each instruction set that this machine has."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gptj8.kernels import cpu, dispatch, operators, reference
from gptj8.quantization.codebooks import dynamic_codebook, fit_codebook
from gptj8.quantization.codec import quantize_blockwise
from gptj8.runtime.errors import QuantizationError
from tests.helpers.paths import ROOT
from tests.kernels.test_cpu import compiled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}

# Prints the errors of products with every number of rows, and whether weights are restored exactly.
SCRIPT = """
import json, sys, torch
from gptj8.kernels import cpu, dispatch, reference
from gptj8.quantization.codebooks import dynamic_codebook
from gptj8.quantization.codec import quantize_blockwise
torch.manual_seed(0)
errors, equal, kernels = {}, [], set()
def note(ours, exact, x):
    found = float((ours.double() - exact).norm() / exact.norm())
    name = str(x.dtype)
    errors[name] = max(found, errors.get(name, 0.0))
for out, columns in ((7, 64), (50, 192), (131, 576), (70, 1152), (9, 4096), (12, 200)):
    for block_size, bits in ((32, 8), (64, 8), (128, 32), (4096, 32)):
        for kind in ("fitted", "dynamic"):
            q = quantize_blockwise(torch.randn(out, columns), block_size, kind, scale_bits=bits)
            weight = reference.dequantize(
                q.codes, q.absmax, q.codebook, block_size, torch.float32, q.levels)
            for dtype in cpu.DTYPES:
                equal.append(torch.equal(weight.to(dtype), cpu.dequantize(
                    q.codes, q.absmax, q.codebook, block_size, dtype, levels=q.levels)))
            arguments = (q.codes, q.absmax, q.codebook, block_size, q.levels)
            for rows in (*range(1, 34), 97, 130):
                for across in (False, True):
                    for dtype in cpu.DTYPES:
                        x = torch.randn(rows, out if across else columns, dtype=dtype)
                        if rows > dispatch.most_rows(x, columns, q.codebook, block_size, across):
                            continue
                        exact = x.double() @ (weight.double() if across else weight.double().t())
                        note(dispatch.multiply(x, *arguments, across), exact, x)
                        kernels.add((across, rows > 8))
print(json.dumps([cpu.instruction_set(), errors, all(equal), len(equal), sorted(kernels)]))
"""


def run(isa: str) -> list:
    """Run the script in a process that is limited to an instruction set."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, cpu.LIMIT: isa},
        text=True,
        capture_output=True,
        check=True,
    )
    return json.loads(found.stdout)


@compiled
@pytest.mark.parametrize("isa", cpu.INSTRUCTION_SETS)
def test_products_and_restored_weights_for_each_instruction_set(isa):
    name, errors, equal, compared, kernels = run(isa)
    position = cpu.INSTRUCTION_SETS.index
    assert position(name) <= position(isa)  # lower on a machine that lacks it
    assert equal and compared == 6 * 4 * 2 * 3
    assert set(errors) == {str(dtype) for dtype in DTYPES}
    for dtype in DTYPES:
        assert errors[str(dtype)] < TOLERANCE[dtype], name
    assert [False, False] in kernels  # across, more than eight rows
    if position(name) > 0:
        assert [True, True] in kernels


@compiled
def test_a_row_gets_the_same_result_in_any_batch():
    """From three rows on; a row alone and two rows are summed in another order."""
    torch.manual_seed(0)
    q = quantize_blockwise(torch.randn(300, 1152), 64, scale_bits=8)
    x = torch.randn(40, 1152)
    arguments = (q.codes, q.absmax, q.codebook, 64, q.levels)
    if not cpu.multiplies(1152, q.codebook):
        pytest.skip("needs kernels for products")
    for across, inputs in ((False, x), (True, torch.randn(40, 300))):
        together = dispatch.multiply(inputs, *arguments, across)
        for rows in (3, 5, 17, 31):
            assert torch.equal(
                dispatch.multiply(inputs[-rows:], *arguments, across), together[-rows:]
            )


@compiled
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_inputs_of_any_size(rows, block_size):
    """One row is multiplied in integers whose unit is chosen for 64 numbers at a time."""
    torch.manual_seed(0)
    q = quantize_blockwise(torch.randn(40, 256), block_size, scale_bits=8)
    weight = reference.dequantize(
        q.codes, q.absmax, q.codebook, block_size, torch.float64, q.levels
    )
    arguments = (q.codes, q.absmax, q.codebook, block_size, q.levels)
    if rows > dispatch.most_rows(torch.ones(1), 256, q.codebook, block_size, False):
        with pytest.raises(QuantizationError, match=f"no kernel multiplies {rows} rows"):
            dispatch.multiply(torch.ones(rows, 256), *arguments)
        return
    plain = torch.randn(rows, 256)
    outliers = plain * torch.where(torch.arange(256) % 64 == 5, 1e4, 1.0)
    spread = plain * torch.logspace(-30, 10, 4).repeat_interleave(64)
    mixed = plain * torch.where(torch.arange(256) < 64, 1e-32, 0.0)
    for x in (
        *(plain * size for size in (1e30, 1e-20, 1e-28, 1e-32)),
        *(outliers, spread, mixed, torch.zeros(rows, 256)),
    ):
        exact, ours = x.double() @ weight.t(), dispatch.multiply(x, *arguments)
        assert float((ours - exact).norm()) <= 1e-6 * float(exact.norm())
    assert not dispatch.multiply(plain * 1e-38, *arguments).isnan().any()
    # Two rows, and one without AVX, are added up in units of 1 / 8192, which overflow from 4e34 on.
    has_integers = cpu.instruction_set().startswith("avx512") or rows > 2
    largest = 3.402e38 if has_integers else 1e33
    for value in (float("nan"), float("inf"), float("-inf"), largest):
        x = plain.clone()
        x[-1, 77] = value
        ours, exact = dispatch.multiply(x, *arguments), x.double() @ weight.t()
        if value == largest:  # some products are too large for float32
            assert torch.allclose(ours[-1], exact[-1].float(), rtol=1e-5)
            continue
        assert torch.equal(ours[-1].isnan(), exact[-1].isnan())
        assert torch.equal(ours[-1].sign().nan_to_num(), exact[-1].sign().float().nan_to_num())
        assert not ours[-1].isfinite().any()
        assert ours[:-1].isfinite().all()


@compiled
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_weights_of_any_size(rows):
    torch.manual_seed(0)
    for size in (1e-30, 1e-20, 1e20):
        q = quantize_blockwise(torch.randn(40, 256) * size, 64, scale_bits=8)
        weight = reference.dequantize(q.codes, q.absmax, q.codebook, 64, torch.float64, q.levels)
        x = torch.randn(rows, 256)
        ours = dispatch.multiply(x, q.codes, q.absmax, q.codebook, 64, q.levels)
        exact = x.double() @ weight.t()
        assert float((ours - exact).norm()) <= 1e-6 * float(exact.norm())


@compiled
def test_the_number_of_threads_changes_nothing():
    torch.manual_seed(0)
    q = quantize_blockwise(torch.randn(1301, 1152), 64, scale_bits=8)
    arguments = (q.codes, q.absmax, q.codebook, 64, q.levels)
    if not cpu.multiplies(1152, q.codebook):
        pytest.skip("needs kernels for products")
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        x, y = torch.randn(20, 1152), torch.randn(20, 1301)
        found.append((dispatch.multiply(x, *arguments), dispatch.multiply(y, *arguments, True)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(cpu.LIMIT, "avx3")
    with pytest.raises(QuantizationError, match="GPTJ8_CPU_ISA = 'avx3' is not one of plain, avx2"):
        cpu._limit()


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_short_blocks_get_a_codebook_of_lines(block_size):
    torch.manual_seed(0)
    for weight in (
        torch.randn(64, 512),
        torch.distributions.StudentT(3.0).sample((64, 512)),
        torch.randn(64, 512).abs(),
        torch.randint(-1, 2, (64, 512)).float(),
        torch.randn(64, 512) * (torch.rand(64, 512) < 0.02),
        torch.randn(1, 3),
    ):
        table = quantize_blockwise(weight, block_size, scale_bits=8).codebook.double() * 8192
        lines = table.view(16, 16)
        slope = lines[:, 1] - lines[:, 0]
        assert torch.equal(table, table.round())
        assert torch.equal(lines, lines[:, :1] + slope[:, None] * torch.arange(16))
        assert bool((slope >= 0).all()) and bool((slope <= 255).all())
        assert bool((table.diff() >= 0).all()) and bool((table == 0).any())
        assert float(table.abs().max()) <= 8192
    free = quantize_blockwise(torch.randn(64, 512), 256).codebook * 8192
    assert not torch.equal(free, free.round())


def test_lines_cost_nothing_in_short_blocks():
    """Against a freely fitted codebook, with scales chosen for each."""
    torch.manual_seed(0)
    for weight in (torch.randn(512, 4096), torch.distributions.Laplace(0, 1).sample((512, 4096))):
        for block_size in (32, 64, 128):
            absmax = reference.absmax(weight.view(-1), block_size)
            mass = reference.histogram(
                weight.view(-1), absmax, (absmax.double() * 1000).round(), block_size, 1 << 15
            )
            errors = []
            for table in (fit_codebook(mass), fit_codebook(mass, in_lines=True)):
                q = quantize_blockwise(weight, block_size, table, scale_bits=8)
                restored = reference.dequantize(
                    q.codes, q.absmax, q.codebook, block_size, torch.float64, q.levels
                )
                errors.append(float((restored - weight).norm() / weight.norm()))
            assert errors[1] < 1.01 * errors[0]


@compiled
def test_16_bit_inputs_are_multiplied_in_float32_without_units_for_them(monkeypatch):
    monkeypatch.setattr(cpu, "native_dtypes", lambda: (torch.float32,))
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    q = quantize_blockwise(torch.randn(96, 128), 64, dynamic_codebook())
    exact = reference.dequantize(q.codes, q.absmax, q.codebook, 64, torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        for rows in (3, 200):
            x, grad = torch.randn(rows, 128).to(dtype), torch.randn(rows, 96).to(dtype)
            bias = torch.randn(96).to(dtype)
            y = operators.frozen_linear(x, q.codes, q.absmax, q.codebook, bias, 64, False)
            dx = operators.frozen_linear_backward(grad, q.codes, q.absmax, q.codebook, 64, False)
            for ours, wanted in (
                (y, x.double() @ exact.t() + bias.double()),
                (dx, grad.double() @ exact),
            ):
                assert ours.dtype == dtype
                assert float((ours - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


@compiled
def test_how_products_are_computed_is_described(monkeypatch):
    device = torch.device("cpu")
    text = dispatch.describe_products(device, torch.float32)
    assert text.startswith(f"compiled kernels ({cpu.instruction_set()}), directly from the codes")
    monkeypatch.setattr(cpu, "most_rows", lambda *_: 1 << 62)
    assert dispatch.describe_products(device, torch.float32).endswith("directly from the codes")
    monkeypatch.setattr(cpu, "most_rows", lambda *arguments: 8 if arguments[3] else 128)
    assert "up to 128 tokens (8 for gradients)" in dispatch.describe_products(device, torch.float32)


@compiled
def test_a_wrong_decoding_of_lines_is_noticed(monkeypatch):
    """The kernels of codebooks of lines are others than those of a table."""
    restore = cpu.dequantize

    def damaged(codes, absmax, codebook, *arguments, **options):
        restored = restore(codes, absmax, codebook, *arguments, **options)
        return restored + 1 if torch.equal(codebook * 8192, (codebook * 8192).round()) else restored

    assert dispatch._compiled_works.__wrapped__()
    monkeypatch.setattr(cpu, "dequantize", damaged)
    assert not dispatch._compiled_works.__wrapped__()


@compiled
@pytest.mark.parametrize("block_size", [32, 128, 256, 4096])
@pytest.mark.parametrize("columns", [64, 96, 100])
@pytest.mark.parametrize("across", [False, True])
def test_codebooks_of_fake_tensors_are_those_of_their_block_size(columns, across, block_size):
    q = quantize_blockwise(torch.randn(64, 512), block_size)
    assert cpu.multiplies(columns, cpu.Kind.of(block_size)) == cpu.multiplies(columns, q.codebook)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q.codebook)
    for dtype in DTYPES:
        x = torch.ones(1, dtype=dtype)
        known = dispatch.most_rows(x, columns, q.codebook, block_size, across)
        assert dispatch.most_rows(x, columns, fake, block_size, across) == known


@compiled
def test_numbers_of_rows_that_a_kernel_cannot_have():
    q = quantize_blockwise(torch.randn(64, 128), 64, scale_bits=8)
    arguments = (q.codes, q.absmax, q.codebook, 64, q.levels)
    with pytest.raises(QuantizationError, match="no rows"):
        dispatch.multiply(torch.ones(0, 128), *arguments)
    if cpu.multiplies(128, q.codebook):  # the kernels for bfloat16 have eight rows at most
        x = torch.randn(9, 128).bfloat16()
        weight = reference.dequantize(q.codes, q.absmax, q.codebook, 64, torch.float64, q.levels)
        exact, ours = x.double() @ weight.t(), dispatch.multiply(x, *arguments)
        assert float((ours - exact).norm() / exact.norm()) < TOLERANCE[torch.bfloat16]


@compiled
@pytest.mark.parametrize("transposed", [False, True])
def test_kept_matrices_are_used_without_units_for_16_bits(monkeypatch, transposed):
    monkeypatch.setattr(cpu, "native_dtypes", lambda: (torch.float32,))
    monkeypatch.setattr(dispatch, "most_rows", lambda *_: 0)
    torch.manual_seed(0)
    q = quantize_blockwise(torch.randn(96, 96), 64, scale_bits=8)
    x = torch.randn(5, 96).bfloat16().requires_grad_()
    arguments = (q.codes, q.absmax, q.codebook, None, 64, transposed, q.levels)
    (wanted,) = torch.autograd.grad(torch.ops.gptj8.frozen_linear(x, *arguments).sum(), x)
    with operators.KeepingMatrices():
        y = torch.ops.gptj8.frozen_linear(x, *arguments).sum()
    assert operators.kept_bytes() == 4 * q.codes.numel()
    with monkeypatch.context() as patch:
        patch.setattr(operators, "_restored_pieces", None)  # nothing is restored again
        (found,) = torch.autograd.grad(y, x)
    assert torch.equal(found, wanted)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (x, *arguments)]
        with operators.KeepingMatrices():
            y = torch.ops.gptj8.frozen_linear(*fakes)
        assert operators.kept_bytes() == 4 * q.codes.numel()
        operators.drop_kept()
