"""Compare frozen layers with full-precision layers that hold the restored weight (twins)."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gptj8.kernels import operators
from gptj8.quantization.codec import quantize_blockwise
from gptj8.quantization.layers import (
    CodesUsedAsWeightsError,
    Frozen8bitLinear,
    Frozen8bitModule,
)
from gptj8.quantization.twins import frozen_twin, full_precision_twin


def linear() -> nn.Module:
    return nn.Linear(48, 40)


def linear_without_bias() -> nn.Module:
    return nn.Linear(48, 40, bias=False)


def conv1d() -> nn.Module:
    return Conv1D(40, 48)


LINEARS = [linear, linear_without_bias, conv1d]


def frozen_pair(make, block_size=64):
    """Return a frozen module and its full-precision twin."""
    torch.manual_seed(0)
    original = make()
    if getattr(original, "bias", None) is not None:
        nn.init.normal_(original.bias)
    frozen = frozen_twin(original, block_size, torch.float32)
    frozen.load_quantized(quantize_blockwise(original.weight, block_size, "fitted"))
    if getattr(original, "bias", None) is not None:
        frozen.bias = nn.Parameter(original.bias.detach().clone())
    return frozen, full_precision_twin(frozen, torch.float32)


def gradients(module: nn.Module, x: torch.Tensor, use_checkpoint: bool | None):
    """Return the output and the gradients of input and bias.

    Args:
        use_checkpoint: `use_reentrant` of activation checkpointing; None to disable it.
    """
    x = x.clone().requires_grad_()
    if use_checkpoint is None:
        y = module(x)
    else:
        y = checkpoint(module, x, use_reentrant=use_checkpoint)
    y.square().sum().backward()
    bias = getattr(module, "bias", None)
    return y.detach(), x.grad, None if bias is None else bias.grad


@pytest.mark.parametrize(
    "use_checkpoint", [None, True, False], ids=["plain", "reentrant", "non-reentrant"]
)
@pytest.mark.parametrize("make", LINEARS)
def test_gradients_match_full_precision(make, use_checkpoint):
    frozen, twin = frozen_pair(make)
    x = torch.randn(3, 5, 48)
    for ours, theirs in zip(
        gradients(frozen, x, use_checkpoint), gradients(twin, x, None), strict=True
    ):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", LINEARS)
def test_only_the_modules_tensors_are_kept_for_backward(make):
    frozen, _ = frozen_pair(make)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = frozen(torch.randn(2, 48, requires_grad=True))
    assert kept == []
    assert {t.data_ptr() for t in y.grad_fn.quantized} == {
        t.data_ptr() for t in (frozen.weight, frozen.absmax, frozen.codebook)
    }


@pytest.mark.parametrize("make", LINEARS)
def test_checkpointing_does_not_repeat_the_last_product(make, monkeypatch):
    frozen, _ = frozen_pair(make)
    products = []
    restored_pieces = operators._restored_pieces

    def counted(*arguments):
        products.append(arguments)
        return restored_pieces(*arguments)

    monkeypatch.setattr(operators, "_restored_pieces", counted)
    x = torch.randn(20, 48, requires_grad=True)
    checkpoint(lambda x: frozen(x.tanh()), x, use_reentrant=False).sum().backward()
    assert len(products) == 2  # forward and backward


@pytest.mark.parametrize("make", LINEARS)
def test_autocast_dtype_is_used(make):
    frozen, twin = frozen_pair(make)
    x = torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = frozen(x), twin(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("block_size", [64, 256], ids=lambda b: f"block{b}")
@pytest.mark.parametrize("columns", [48, 64, 80])
def test_restoring_a_matrix_in_pieces_gives_the_same_results(monkeypatch, columns, block_size):
    torch.manual_seed(4)
    original = nn.Linear(columns, 100)
    frozen = frozen_twin(original, block_size, torch.float32)
    frozen.load_quantized(quantize_blockwise(original.weight, block_size, "fitted"))
    x = torch.randn(3, 5, columns)
    twin = full_precision_twin(frozen, torch.float32)
    monkeypatch.setattr(operators, "_CACHED_PIECE", 1500)
    assert operators.piece_rows(x, (100, columns), block_size, whole=False) < 32
    torch.testing.assert_close(frozen(x), twin(x), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(frozen, x, None), gradients(twin, x, None), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 20], ids=["few-rows", "restored"])
@pytest.mark.parametrize("make", LINEARS)
def test_second_derivatives_match_full_precision(make, rows):
    frozen, twin = frozen_pair(make)
    second = []
    for module in (frozen, twin):
        torch.manual_seed(5)
        x = torch.randn(rows, 48, requires_grad=True)
        (first,) = torch.autograd.grad(module(x.tanh()).tanh().sum(), x, create_graph=True)
        module(torch.randn(rows, 48))  # overwrites the shared memory of restored weights
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", LINEARS)
def test_inputs_of_the_wrong_width_raise(make):
    frozen, _ = frozen_pair(make)
    for width in (32, 96):
        with pytest.raises(
            RuntimeError, match=rf"x has shape \(2, {width}\); its last dimension must be 48"
        ):
            frozen(torch.randn(2, width))


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48)], ids=str)
def test_unusual_shapes_match_full_precision(shape):
    frozen, twin = frozen_pair(linear)
    x = torch.randn(shape)
    torch.testing.assert_close(frozen(x), twin(x))
    for module in (frozen, twin):
        module(x).sum().backward()
    torch.testing.assert_close(frozen.bias.grad, twin.bias.grad)


def test_float64_matches_full_precision():
    frozen, twin = frozen_pair(linear)
    x = torch.randn(3, 48, dtype=torch.float64)
    assert torch.equal(frozen.double()(x), twin.double()(x))


def test_results_do_not_depend_on_the_default_device():
    frozen, _ = frozen_pair(linear)
    x = torch.randn(12, 48)
    expected = frozen(x), frozen(x[:2])
    with torch.device("meta"):
        assert torch.equal(frozen(x), expected[0])
        assert torch.equal(frozen(x[:2]), expected[1])


@pytest.mark.parametrize("rows", [2, 20], ids=["few-rows", "restored"])
@pytest.mark.parametrize("make", LINEARS)
def test_compile_export_and_meta_device(make, rows):
    frozen, _ = frozen_pair(make)
    x = torch.randn(rows, 48)
    expected = gradients(frozen, x, None)
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, x, None), expected, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(torch.export.export(frozen, (x,)).module()(x), expected[0])
    assert frozen.to("meta")(x.to("meta")).shape == (rows, 40)


def test_output_can_be_changed_in_place():
    frozen, _ = frozen_pair(linear)
    x = torch.randn(2, 48, requires_grad=True)
    y = frozen(x)
    y += 1.0
    y.sum().backward()
    assert x.grad is not None


def test_the_weight_has_no_gradient():
    frozen, _ = frozen_pair(linear)
    frozen(torch.randn(2, 48, requires_grad=True)).sum().backward()
    assert not frozen.weight.requires_grad
    assert frozen.weight.grad is None


@pytest.mark.parametrize("dim", [8, 48, 64, 128, 200], ids=lambda d: f"dim{d}")
def test_embedding_matches_full_precision(dim):
    torch.manual_seed(1)
    original = nn.Embedding(31, dim)
    frozen = frozen_twin(original, 64, torch.float32)
    frozen.load_quantized(quantize_blockwise(original.weight, 64, "fitted"))
    twin = full_precision_twin(frozen, torch.float32)
    ids = torch.randint(0, 31, (3, 7))
    assert torch.equal(frozen(ids), twin(ids))
    assert torch.equal(frozen.to(torch.bfloat16)(ids), twin(ids).bfloat16())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_do_not_change_absmax_and_codebook(cast):
    frozen, _ = frozen_pair(linear)
    before = frozen.quantized_weight
    getattr(frozen, cast)()
    assert torch.equal(frozen.absmax, before.absmax)
    assert torch.equal(frozen.codebook, before.codebook)
    assert torch.equal(frozen.weight, before.codes)
    assert frozen.bias.dtype == getattr(torch.ones(1), cast)().dtype


def test_moving_to_another_device_moves_all_tensors():
    frozen, _ = frozen_pair(linear)
    moved = frozen.to("meta")
    assert {t.device.type for t in (moved.weight, moved.absmax, moved.codebook, moved.bias)} == {
        "meta"
    }


@pytest.mark.parametrize("make", [*LINEARS, lambda: nn.Embedding(11, 48)])
@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_and_pickled_modules_give_the_same_results(make, through):
    torch.manual_seed(2)
    original = make()
    frozen = frozen_twin(original, 64, torch.float32)
    frozen.load_quantized(quantize_blockwise(original.weight, 64, "dynamic"))
    x = torch.arange(5) if isinstance(original, nn.Embedding) else torch.randn(2, 48)
    assert torch.equal(through(frozen)(x), frozen(x))


@pytest.mark.parametrize(
    "after",
    [
        lambda m: m,
        lambda m: m.to(torch.bfloat16),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.load_state_dict(m.state_dict(), assign=True) and m,
    ],
    ids=["new", "cast", "deepcopy", "pickle", "assigned-state-dict"],
)
def test_in_place_arithmetic_on_codes_raises(after):
    frozen, _ = frozen_pair(linear)
    changed = after(frozen)
    codes = changed.weight.detach().clone()
    with pytest.raises(ValueError, match="cannot be merged"):
        changed.weight.data += torch.ones(40, 48, dtype=torch.uint8)
    copied = changed.weight.data.clone()
    with pytest.raises(ValueError, match="cannot be merged"):
        copied -= torch.ones(40, 48, dtype=torch.uint8)
    assert torch.equal(changed.weight, codes)


def test_state_dict_round_trip_is_bit_identical():
    frozen, _ = frozen_pair(linear)
    other = frozen_twin(linear(), 64, torch.float32)
    other.load_state_dict(frozen.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(other(x), frozen(x))


class Transposed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Routed(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2)


class Masked(nn.Linear):
    def __init__(self, rows, columns):
        super().__init__(rows, columns)
        self.register_buffer("mask", torch.ones(columns, rows))


def test_linear_subclasses_are_replaced_if_they_compute_the_same():
    assert type(frozen_twin(Transposed(4, 4), 64, None)) is Frozen8bitLinear
    for other in (Doubled, Routed, Masked):
        assert frozen_twin(other(4, 4), 64, None) is None, other
    assert frozen_twin(nn.MultiheadAttention(4, 2).out_proj, 64, None) is None
    assert frozen_twin(nn.LayerNorm(4), 64, None) is None


class Scaled(nn.Embedding):
    """Like Gemma's: the factor follows the weight's dtype."""

    def __init__(self, rows, columns, padding_idx=None):
        super().__init__(rows, columns, padding_idx)
        self.factor = nn.Buffer(torch.tensor(1.7), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.factor.to(self.weight.dtype)


class Shifted(nn.Embedding):
    """Like BART's positions, and with a child."""

    def __init__(self, rows, columns):
        super().__init__(rows, columns)
        self.norm = nn.LayerNorm(columns)

    def forward(self, ids, shift=2):
        return self.norm(super().forward(ids + shift))


class Direct(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_embedding_subclasses_run_their_own_forward(kind, dtype):
    original = kind(20, 64)
    frozen = frozen_twin(original, 64, torch.float32)
    assert isinstance(frozen, kind) and isinstance(frozen, Frozen8bitModule)
    frozen.load_quantized(quantize_blockwise(original.weight, 64))
    frozen = copy.deepcopy(frozen).to(dtype)
    twin = full_precision_twin(frozen, dtype)
    assert type(twin) is kind
    ids = torch.tensor([[3, 0, 7]])
    assert torch.equal(frozen(ids), twin(ids))
    assert frozen(ids).dtype == dtype
    restored = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(restored(ids), twin(ids))
    error = (frozen(ids) - original.to(dtype)(ids)).norm() / frozen(ids).norm()
    assert error < 0.01


def test_an_embedding_that_uses_its_weight_itself_raises():
    frozen = frozen_twin(Direct(20, 64), 64, torch.float32)
    with pytest.raises(CodesUsedAsWeightsError):
        frozen(torch.tensor([1]))


def test_frozen_modules_are_recognized_by_peft():
    frozen, _ = frozen_pair(linear)
    assert isinstance(frozen, nn.Linear)
    assert isinstance(frozen, Frozen8bitModule)
