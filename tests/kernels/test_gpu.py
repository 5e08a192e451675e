"""Compare the Triton kernels with the torch reference, on a GPU or in Triton's CPU interpreter.

Triton reads TRITON_INTERPRET when it is imported, and bitsandbytes imports it. Without a GPU, the
tests of `TestKernels` therefore run in a separate pytest process with TRITON_INTERPRET set.
"""

import os
import subprocess
import sys
import threading

import pytest
import torch

from gptj8.kernels import gpu, reference
from gptj8.quantization.codebooks import dynamic_codebook
from tests.helpers.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
RUNS_HERE = INTERPRETED or DEVICE.type == "cuda"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# (in, out, block_size), named by the position of block ends in the rows of the matrix.
SHAPES = {
    "one block per row": (1024, 9, 1024),
    "several blocks per row": (2048, 5, 1024),
    "small blocks": (256, 33, 64),
    "smallest blocks": (256, 33, 32),
    "several rows per block": (256, 37, 4096),
    "short last block": (64, 70, 4096),
    "unaligned blocks": (1100, 9, 1024),
    "many unaligned blocks per row": (1000, 9, 64),
    "odd row length": (77, 35, 64),
    "narrow": (3, 50, 64),
    "one weight": (1, 1, 64),
}


def quantized(shape: tuple[int, ...], block_size: int) -> tuple[torch.Tensor, ...]:
    """Return random codes, absmax and codebook; one block is zero and one has tiny values."""
    generator = torch.Generator().manual_seed(block_size)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-codes.numel() // block_size), generator=generator) + 0.01
    if len(absmax) > 3:
        absmax[1], absmax[2] = 0.0, 1e-7
    return codes.to(DEVICE), absmax.to(DEVICE), dynamic_codebook().to(DEVICE)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, to distinguish -0 from 0."""
    return tensor.contiguous().view(torch.uint8)


class TestKernels:
    __test__ = RUNS_HERE

    def test_kernels_are_available(self):
        assert gpu.is_available(DEVICE)

    @pytest.mark.parametrize("n", [1, 255, 4096, 20_001])
    @pytest.mark.parametrize("block_size", [32, 64, 1024, 4096])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dequantize_is_bit_identical_to_the_reference(self, dtype, block_size, n):
        codes, absmax, codebook = quantized((n,), block_size)
        expected = reference.dequantize(codes, absmax, codebook, block_size, dtype)
        ours = gpu.dequantize(codes, absmax, codebook, block_size, dtype)
        assert ours.dtype == dtype
        assert torch.equal(bits(ours), bits(expected))

    def test_dequantize_writes_to_out(self):
        codes, absmax, codebook = quantized((5, 100), 64)
        out = torch.empty(5, 100, dtype=torch.bfloat16, device=DEVICE)
        assert gpu.dequantize(codes, absmax, codebook, 64, out.dtype, out) is out
        assert torch.equal(out, reference.dequantize(codes, absmax, codebook, 64, out.dtype))
        nothing = torch.empty(0, dtype=torch.uint8, device=DEVICE)
        assert not gpu.dequantize(nothing, absmax[:0], codebook, 64, out.dtype).numel()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_16_bit_values_and_ties_round_like_torch(self, dtype):
        # Each block's absmax is a 16-bit value or the midpoint of two, multiplied by a codebook
        # value of 1 or -1.
        values = torch.arange(0, 1 << 15, 31, dtype=torch.int32).to(torch.int16).view(dtype).float()
        values = values[values.isfinite()]
        above = torch.nextafter(values.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
        between = ((values.double() + above.double()) / 2).float()
        absmax = torch.cat([values, between, torch.tensor([65519.0, 65520.0, 1e30, 3.4e38])])
        absmax = absmax[absmax.isfinite()].to(DEVICE)
        codebook = torch.linspace(-1, 1, 256, device=DEVICE)
        for code in (0, 255):
            codes = torch.full((len(absmax) * 64,), code, dtype=torch.uint8, device=DEVICE)
            ours = gpu.dequantize(codes, absmax, codebook, 64, dtype)
            expected = (absmax * codebook[code]).to(dtype)
            assert torch.equal(bits(ours[::64]), bits(expected))
            assert torch.equal(bits(ours[63::64]), bits(expected))

    @pytest.mark.parametrize("rows", [1, 3, 16])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_linear_matches_the_product_with_the_restored_matrix(self, dtype, shape, rows):
        in_features, out_features, block_size = shape
        codes, absmax, codebook = quantized((out_features, in_features), block_size)
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, in_features, generator=generator).to(DEVICE, dtype)
        bias = torch.randn(out_features, generator=generator).to(DEVICE, dtype)
        restored = reference.dequantize(codes, absmax, codebook, block_size, torch.float32)
        products = x.double() @ restored.double().t()
        # The bound covers any order of summation, and one rounding to the output dtype.
        magnitudes = x.double().abs() @ restored.double().abs().t() + bias.double().abs()
        for addend in (bias, None):
            y = gpu.linear(x, codes, absmax, codebook, addend, block_size)
            expected = products if addend is None else products + addend.double()
            assert (y.shape, y.dtype) == ((rows, out_features), dtype)
            lost = magnitudes * 2e-6 + expected.abs() * (torch.finfo(dtype).eps / 2 * 1.001) + 1e-7
            assert ((y.double() - expected).abs() <= lost).all()

    def test_linear_accepts_strided_x_and_another_bias_dtype(self):
        codes, absmax, codebook = quantized((20, 128), 64)
        wide = torch.randn(128, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE).half()
        bias = torch.arange(20.0, device=DEVICE)
        x = wide.t()[1::3]
        ours = gpu.linear(x, codes, absmax, codebook, bias, 64)
        same = gpu.linear(x.contiguous(), codes, absmax, codebook, bias.half(), 64)
        torch.testing.assert_close(ours, same, rtol=2e-3, atol=1e-4)  # tuned separately

    @pytest.mark.parametrize("rows", [1, 2])
    def test_linear_ignores_memory_beyond_the_matrix(self, rows):
        # A weight outside the matrix, loaded as 0, times an infinite x would be NaN.
        codes, absmax, codebook = quantized((7, 70), 64)
        x = torch.zeros(rows, 70, device=DEVICE, dtype=torch.bfloat16)
        x[0, 69] = torch.inf
        weight = reference.dequantize(codes, absmax, codebook, 64, torch.float32)
        y = gpu.linear(x, codes, absmax, codebook, None, 64)
        assert torch.equal(y[0].isnan(), weight[:, 69] == 0)
        assert not y[1:].any()

    def test_linear_keeps_nan_in_bfloat16(self):
        # On GPUs the bits of NaN are all ones; rounding them up like a number would give -0.
        codes, absmax, codebook = quantized((2, 64), 64)
        x = torch.zeros(1, 64, device=DEVICE, dtype=torch.bfloat16)
        bias = torch.tensor([0x7FFFFFFF, 0], dtype=torch.int32, device=DEVICE).view(torch.float32)
        y = gpu.linear(x, codes, absmax, codebook, bias, 64)
        assert y.isnan().tolist() == [[True, False]]

    def test_linear_without_rows(self):
        codes, absmax, codebook = quantized((7, 70), 64)
        x = torch.empty(0, 70, device=DEVICE)
        assert gpu.linear(x, codes, absmax, codebook, None, 64).shape == (0, 7)

    def test_linear_raises_for_invalid_shapes(self):
        codes, absmax, codebook = quantized((7, 70), 64)
        for x, bias, message in (
            (torch.zeros(17, 70), None, "at most 16"),
            (torch.zeros(2, 71), None, "shapes do not match"),
            (torch.zeros(2, 70), torch.zeros(8), "shapes do not match"),
        ):
            bias = bias if bias is None else bias.to(DEVICE)
            with pytest.raises(ValueError, match=message):
                gpu.linear(x.to(DEVICE), codes, absmax, codebook, bias, 64)

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="more than 2^31 weights need a GPU")
    def test_more_than_2_to_the_31_weights(self):
        if torch.cuda.mem_get_info()[0] < 10 << 30:
            pytest.skip("needs 10 GiB of GPU memory")
        in_features, block_size = 4096, 4096
        shape = ((1 << 19) + 3, in_features)
        codes = torch.randint(0, 256, shape, device=DEVICE, dtype=torch.uint8)
        absmax = torch.rand(len(codes), device=DEVICE)
        codebook = dynamic_codebook().to(DEVICE)
        x = torch.randn(2, in_features, device=DEVICE)
        tail = slice(len(codes) - 50, None)
        ours = gpu.linear(x, codes, absmax, codebook, None, block_size)[:, tail]
        theirs = gpu.linear(x, codes[tail], absmax[tail], codebook, None, block_size)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        restored = gpu.dequantize(codes, absmax, codebook, block_size, torch.float16)
        expected = reference.dequantize(
            codes[tail], absmax[tail], codebook, block_size, torch.float16
        )
        assert torch.equal(restored[tail], expected)


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_kernels_are_not_available_without_gpu_or_interpreter():
    assert not gpu.is_available(torch.device("cpu"))
    assert not gpu.is_available(torch.device("cuda"))
    assert not gpu.is_available(torch.device("meta"))


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_the_interpreter_is_not_used_if_enabled_after_the_import(monkeypatch, caplog):
    import triton.language  # noqa: F401 (the import reads TRITON_INTERPRET)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu._works.cache_clear()
    assert not gpu.is_available(torch.device("cpu"))
    assert "after Triton was imported" in caplog.text
    gpu._works.cache_clear()


@pytest.mark.parametrize("without", ["triton", "compiler"])
def test_kernels_are_not_available_without_triton_or_a_compiler(without, monkeypatch, caplog):
    if without == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:

        def fail():
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(gpu, "_load", fail)
    gpu._works.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert not gpu._works("cpu" if INTERPRETED else DEVICE.type, None)
    if without != "triton":
        assert "Failed to find C compiler" in caplog.text
    gpu._works.cache_clear()


# The interpreter accepts code that the compiler rejects. bfloat16 is stored as integers.
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("capability", [75, 80, 90, 120])
@pytest.mark.parametrize(("x", "out"), [("*fp16", "*fp16"), ("*bf16", "*i16"), ("*fp32", "*fp32")])
def test_kernels_compile_for_other_gpus(x, out, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    loaded = gpu._load()
    arrays = {"x": x, "codes": "*u8", "absmax": "*fp32", "codebook": "*fp32", "bias": x, "out": out}
    counts = {"n": "i64", "rows": "i32", "out_features": "i32"}
    shape = {"IN": 4096, "BLOCK_SIZE": 64, "WIDTH": 64, "ONE_SCALE": True, "HAS_BIAS": True}
    any_shape = {**shape, "IN": 1100, "WIDTH": 512, "ONE_SCALE": False}
    types = {**arrays, **counts}
    for kernel, constants in (
        (loaded.dequantize, {"BLOCK_SIZE": 64, "TILE": 1024}),
        (loaded.linear.fn, {**shape, "ROWS": 1, "TILE": 2048}),
        (loaded.linear.fn, {**any_shape, "ROWS": 4, "TILE": 1024}),
    ):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_no_block_ends_inside_a_tile_with_one_absmax():
    for in_features in (1, 3, 63, 64, 96, 1000, 1024, 1100, 4096, 4160, 12_288, 16_384):
        for block_size in (64, 1024, 4096):
            width, one_scale = gpu._tile_width(in_features, block_size)
            assert width & (width - 1) == 0 and 64 <= width <= 512
            ends = {at % in_features for at in range(0, block_size * in_features, block_size)}
            if one_scale:
                assert all(end % width == 0 for end in ends) and in_features % width == 0


def test_at_least_one_configuration_remains_for_every_number_of_rows():
    from triton import Config

    configs = [Config({"TILE": tile}, num_warps=warps) for tile, warps in gpu._TILES]
    for rows in (1, 2, 4, 8, 16):
        assert gpu._prune_configs(configs, {}, ROWS=rows)
    assert all(tile >= gpu._WIDEST for tile, _ in gpu._TILES)


@pytest.mark.skipif(RUNS_HERE, reason="reloads the kernels")
def test_threads_can_load_the_kernels_concurrently():
    gpu._load.cache_clear()
    threads = [threading.Thread(target=gpu._load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(gpu._store_rounded, type(gpu._load().dequantize))
