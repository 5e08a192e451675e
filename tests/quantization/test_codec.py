"""Compare the codec with a brute-force search in float64, NumPy and bitsandbytes."""

import math

import numpy as np
import pytest
import torch

from gptj8.kernels.dispatch import dequantize as fastest_dequantize
from gptj8.quantization.codebooks import dynamic_codebook
from gptj8.quantization.codec import (
    BLOCK_SIZES,
    QuantizationError,
    QuantizedTensor,
    dequantize_blockwise,
    quantize_blockwise,
    squared_errors,
)


def brute_force_codes(weight: np.ndarray, codebook: np.ndarray, block_size: int) -> np.ndarray:
    """Return the nearest codebook entry of each float32 quotient, comparing all in float64."""
    codes = []
    flat = weight.astype(np.float32).ravel()
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        largest = np.abs(block).max()
        normalized = block / largest if largest else block
        distance = np.abs(normalized.astype(np.float64)[:, None] - codebook.astype(np.float64))
        codes.append(distance.argmin(axis=1))
    return np.concatenate(codes).reshape(weight.shape)


@pytest.mark.parametrize("codebook", ["dynamic", "fitted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 99), (4, 64), (1,), (65,)], ids=str)
def test_codes_are_the_nearest(shape, dtype, codebook):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantized = quantize_blockwise(weight, block_size=64, codebook=codebook)
    expected = brute_force_codes(weight.float().numpy(), quantized.codebook.numpy(), 64)
    # Compare values, not codes: a codebook fitted to few weights may contain a value twice.
    values = quantized.codebook.numpy()
    np.testing.assert_array_equal(values[quantized.codes.numpy()], values[expected])


def test_ties_and_adjacent_values_are_rounded_exactly():
    codebook = dynamic_codebook()
    middles = ((codebook[1:].double() + codebook[:-1].double()) / 2).float()
    infinity = torch.full_like(middles, math.inf)
    values = torch.cat(
        [middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)]
    )
    values = torch.cat([torch.ones(1), values])  # an absmax of 1 leaves the values unchanged
    values = values[: len(values) // 64 * 64].view(-1, 64)
    values[:, 0] = 1.0
    quantized = quantize_blockwise(values, block_size=64, codebook="dynamic")
    expected = brute_force_codes(values.numpy(), codebook.numpy(), 64)
    np.testing.assert_array_equal(quantized.codes.numpy(), expected)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_error_is_at_most_half_a_codebook_step(block_size):
    weight = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    quantized = quantize_blockwise(weight, block_size, "dynamic")
    assert quantized.absmax.shape == (math.ceil(15000 / block_size),)
    # The map ends at -0.993, so the error of -1 is larger than half a step.
    widest = max(float(quantized.codebook.diff().max()) / 2, 1 + float(quantized.codebook[0]))
    error = (dequantize_blockwise(quantized) - weight).abs().flatten()
    # 2^-22 allows for rounding the product of codebook value and absmax to float32.
    bound = quantized.absmax.repeat_interleave(block_size)[:15000] * (widest + 2**-22)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("codebook", ["dynamic", "fitted"])
def test_zeros_stay_zero(codebook):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    weight[weight.abs() < 0.5] = 0.0
    weight[3] = 0.0
    weight[5, 5] = -0.0
    restored = dequantize_blockwise(quantize_blockwise(weight, 64, codebook))
    assert torch.equal(restored == 0, weight == 0)
    zeros = torch.zeros(100)
    assert torch.equal(dequantize_blockwise(quantize_blockwise(zeros, 64, codebook)), zeros)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e30], ids=str)
def test_extreme_magnitudes_stay_finite(scale):
    weight = torch.linspace(-1, 1, 128) * scale
    quantized = quantize_blockwise(weight, 64, "fitted")
    assert bool(torch.isfinite(dequantize_blockwise(quantized)).all())
    assert torch.equal(quantized.absmax[0], weight[:64].abs().max())


def test_dynamic_codebook_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_codebook(), functional.create_dynamic_map().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 100), (4096,), (3,), (1000, 7)], ids=str)
def test_dequantization_is_bit_identical_to_numpy(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    q = quantize_blockwise(weight, 256, "fitted")
    native = fastest_dequantize(q.codes, q.absmax, q.codebook, q.block_size, dtype)
    reference = dequantize_blockwise(q, dtype)
    assert torch.equal(native, reference)
    exact = q.codebook.numpy()[q.codes.numpy()] * np.repeat(q.absmax.numpy(), 256)[
        : weight.numel()
    ].reshape(shape)
    assert torch.equal(reference, torch.from_numpy(exact).to(dtype))


@pytest.mark.parametrize(
    ("distribution", "bound", "dynamic_error"),
    [
        (torch.distributions.Normal(0.0, 1.0), 0.0063, 0.0130),
        (torch.distributions.Laplace(0.0, 1.0), 0.0078, 0.0164),
        (torch.distributions.StudentT(4.0), 0.0095, 0.0197),
    ],
    ids=["normal", "laplace", "student-t4"],
)
def test_fitted_codebook_halves_the_error(distribution, bound, dynamic_error):
    torch.manual_seed(5)
    weight = distribution.sample((512, 4096))

    def relative(codebook):
        error, norm = squared_errors(weight, quantize_blockwise(weight, 4096, codebook))
        return math.sqrt(error / norm)

    assert relative("fitted") <= bound
    assert relative("dynamic") == pytest.approx(dynamic_error, rel=0.03)


def test_squared_errors_match_numpy():
    weight = torch.randn(333, 77, generator=torch.Generator().manual_seed(6))
    q = quantize_blockwise(weight, 128, "dynamic")
    error, norm = squared_errors(weight, q)
    difference = dequantize_blockwise(q).double().numpy() - weight.double().numpy()
    assert error == pytest.approx(float((difference**2).sum()), rel=1e-9)
    assert norm == pytest.approx(float((weight.double().numpy() ** 2).sum()), rel=1e-9)


def test_a_custom_codebook_is_used():
    codebook = torch.linspace(-1, 1, 256)
    q = quantize_blockwise(torch.linspace(-3, 3, 128), 64, codebook)
    assert torch.equal(q.codebook, codebook)


@pytest.mark.parametrize("block_size", [0, -1, 3, 16, 8192, 2**64, True, 64.5], ids=str)
def test_invalid_block_sizes_raise(block_size):
    with pytest.raises(QuantizationError, match="block_size = "):
        quantize_blockwise(torch.ones(10), block_size)


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_non_finite_weights_raise(value, shown):
    weight = torch.ones(8, 100)
    weight[6, 42] = value
    with pytest.raises(QuantizationError, match=rf"lm_head\.weight\[6, 42\] = {shown}"):
        quantize_blockwise(weight, 64, name="lm_head.weight")


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        (torch.linspace(-1, 1, 255), "shape"),
        (torch.linspace(1, -1, 256), "not ascending"),
        (torch.full((256,), math.nan), "not finite"),
        (torch.arange(256), "dtype"),
        ("linear", "codebook = 'linear' is not one of dynamic, fitted"),
    ],
    ids=["255", "descending", "nan", "integers", "unknown-name"],
)
def test_invalid_codebooks_raise(codebook, message):
    with pytest.raises(QuantizationError, match=message):
        quantize_blockwise(torch.ones(10), 64, codebook)


def test_integer_weights_raise():
    with pytest.raises(QuantizationError, match="dtype"):
        quantize_blockwise(torch.ones(10, dtype=torch.int32), 64)


def test_mismatched_parts_raise():
    q = quantize_blockwise(torch.ones(1000), 64, "dynamic")
    with pytest.raises(QuantizationError, match=r"absmax has shape \(15,\).*\(16,\)"):
        QuantizedTensor(q.codes, q.absmax[:-1], q.codebook, 64)
    with pytest.raises(QuantizationError, match=r"absmax is torch\.bfloat16"):
        QuantizedTensor(q.codes, q.absmax.bfloat16(), q.codebook, 64)
    with pytest.raises(QuantizationError, match="codes are"):
        QuantizedTensor(q.codes.int(), q.absmax, q.codebook, 64)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.flatten()[::2],
        lambda w: w[:, :1],
        lambda w: w[:1, :1].expand(5, 100),
        lambda w: torch._neg_view(w),
        lambda w: w.t(),
    ],
    ids=["strided", "column", "expanded", "negated", "transposed"],
)
def test_a_view_is_quantized_like_its_copy(view):
    weight = view(torch.randn(200, 30, generator=torch.Generator().manual_seed(7)))
    copied = torch.tensor(weight.tolist())
    ours, expected = quantize_blockwise(weight, 64), quantize_blockwise(copied, 64)
    assert torch.equal(ours.codes, expected.codes)
    assert squared_errors(weight, ours) == squared_errors(copied, expected)


def test_squared_errors_of_different_shapes_raise():
    q = quantize_blockwise(torch.randn(100), 64)
    message = r"shape \(10000,\), but the codes have shape \(100,\)"
    with pytest.raises(QuantizationError, match=message):
        squared_errors(torch.randn(10_000), q)


def test_restoring_to_float64_gives_the_float32_product():
    q = quantize_blockwise(torch.randn(100), 64)
    assert torch.equal(dequantize_blockwise(q, torch.float64), dequantize_blockwise(q).double())
