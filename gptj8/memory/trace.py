"""Record the allocations of a training step on tensors that have shapes but no memory.

Under torch's FakeTensorMode the complete model code runs, including autograd and checkpointing, and
`_Recorder` tracks when each storage is allocated and freed. It cannot see temporary memory inside
an operator. `_inside` computes that and must match `gptj8.kernels.operators` and torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptj8.kernels import dispatch, operators
from gptj8.runtime.process import LARGE_BLOCK
from gptj8.training.activation_checkpointing import Kind, set_checkpointing
from gptj8.training.loss import frozen_cross_entropy, frozen_head, input_of

if TYPE_CHECKING:
    from peft import PeftModel

PHASES = ("forward", "loss", "backward")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_ATTENTION = "scaled_dot_product"


@dataclass
class Trace:
    """Allocations of one step, without weights and optimizer.

    Attributes:
        peaks: Phase -> component -> bytes, at the peak of the phase.
        workspace: Bytes of the largest dequantized piece of a matrix; kept on a CPU.
        in_heap: Peak bytes of tensors smaller than `runtime.LARGE_BLOCK`.
        flops: Multiplications and additions of matrix products, forward and backward.
        products: Shape of a matrix product -> number of elements of the second matrix.
    """

    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    workspace: int = 0
    in_heap: int = 0
    flops: int = 0
    products: dict[tuple[Any, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Shape of a batch.

    Attributes:
        rows: Number of rows.
        length: Tokens per row, including padding.
        learned: Positions per row that get logits.
        padded: Whether rows differ in length, so that attention needs a mask.
        packed: Whether a row of the batch holds several rows of the data, which changes the mask.
    """

    rows: int
    length: int
    learned: int
    padded: bool = True
    packed: bool = False


@torch.random.fork_rng(devices=[])
def trace_training_step(
    model: PeftModel, batch: Batch, checkpointing: Kind, autocast: torch.dtype | None = None
) -> Trace:
    """Run forward, loss and backward of one micro-batch and record the allocations.

    Args:
        model: From `skeleton.build`; its tensors are replaced by fake ones.
        batch: Shape of the micro-batch.
        checkpointing: Kind of activation checkpointing.
        autocast: Autocast dtype, as in training; None: no autocast.
    """
    with _recording(model) as recorder:
        model.config.use_cache = False
        model.train()
        set_checkpointing(model, checkpointing)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = _loss(model, batch, recorder)
        repeats = checkpointing != "none"
        recorder.enter("backward", "recomputed layer" if repeats else "gradients of layers")
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                recorder.name(parameter.grad, "gradients")
        return recorder.result()


@torch.random.fork_rng(devices=[])
def trace_evaluation(model: PeftModel, batch: Batch) -> Trace:
    """Run a forward pass with logits at `batch.learned` positions per row; record allocations."""
    with _recording(model) as recorder, torch.inference_mode():
        model.config.use_cache = False
        model.eval()
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
        kept = torch.zeros(batch.learned, dtype=torch.int64)
        model(input_ids=ids, attention_mask=_mask(batch), logits_to_keep=kept)
        return recorder.result()


def _loss(model: PeftModel, batch: Batch, recorder: _Recorder) -> torch.Tensor:
    """Return the loss as training computes it: only at learned positions, in chunks if the head is
    frozen."""
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    arguments: dict[str, Any] = {
        "input_ids": ids,
        **_mask_arguments(batch),
        "logits_to_keep": torch.zeros(batch.learned, dtype=torch.int64),
    }
    targets = torch.zeros(batch.rows * batch.learned, dtype=torch.int64)
    head = frozen_head(model)
    if head is None:
        logits = model(**arguments).logits
        recorder.enter("loss", "logits and loss", keep=True)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
    with input_of(head) as taken:
        outputs = model(**arguments)
    recorder.enter("loss", "logits and loss", keep=True)
    learned = torch.zeros(len(targets), dtype=torch.int64)
    loss = frozen_cross_entropy(taken[0].flatten(0, 1)[learned], targets, head)
    del outputs
    return loss


def _mask_arguments(batch: Batch) -> dict[str, torch.Tensor | None]:
    """Return what the model makes its attention mask from."""
    if batch.packed:
        return {"position_ids": torch.zeros(batch.rows, batch.length, dtype=torch.int64)}
    return {"attention_mask": _mask(batch)}


def _mask(batch: Batch) -> torch.Tensor | None:
    """Return the attention mask; None without padding, because transformers then drops the mask."""
    if not batch.padded or batch.rows == 1:
        return None
    return torch.ones(batch.rows, batch.length, dtype=torch.int64)


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Recorder]:
    dispatch.describe(torch.device("cpu"))  # loads and tests the compiled kernels with real tensors
    state = torch.get_rng_state()
    recorder = _Recorder()
    try:
        with FakeTensorMode():
            _make_fake(model)
            recorder.leave_out(model)
            with recorder:
                yield recorder
    finally:
        torch.set_rng_state(state)


def _make_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU; shared tensors remain shared."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            tensors: dict[str, Any] = store  # type: ignore[assignment]
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if store is module._parameters:
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


class _Recorder(TorchDispatchMode):
    """Track each storage from its allocation by an operator until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self._phase, self._component = "forward", "activations"
        self._live: dict[int, tuple[int, Any]] = {}  # number -> bytes, weak reference to storage
        self._numbers: dict[int, int] = {}  # address of a live storage -> number
        self._named: dict[int, str] = {}
        self._count = self._bytes = self._in_heap = 0
        self._most = dict.fromkeys(PHASES, -1)
        self._at_peak: dict[str, tuple[dict[int, int], dict[str, int]]] = {}
        self._trace = Trace()

    def leave_out(self, model: nn.Module) -> None:
        """Exclude the model's own tensors, because operators may return views of them."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._numbers[tensor.untyped_storage()._cdata] = 0

    def enter(self, phase: str, component: str, keep: bool = False) -> None:
        """Begin a phase.

        Args:
            phase: One of `PHASES`.
            component: Name for tensors that are allocated from now on.
            keep: Whether to relabel all live tensors as kept for backward.
        """
        if keep:
            for number in self._live:
                self._named[number] = "kept for backward"
        self._phase, self._component = phase, component
        self._note({})

    def name(self, tensor: torch.Tensor, component: str) -> None:
        """Set the component of a tensor."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._named[number] = component

    def result(self) -> Trace:
        """Return the recorded trace."""
        for phase, (live, inside) in self._at_peak.items():
            found = dict(inside)
            for number, size in live.items():
                component = self._named[number]
                found[component] = found.get(component, 0) + size
            self._trace.peaks[phase] = found
        return self._trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        new = False
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                new |= self._see(tensor, name)
        inside, workspace = _inside(name, args, output)
        self._trace.workspace = max(self._trace.workspace, workspace)
        self._trace.flops += _flops(name, args, output)
        self._trace.products |= _product(name, args)
        if new or inside:
            self._note({self._component: inside})
        return output

    def _see(self, tensor: torch.Tensor, name: str) -> bool:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return False
        self._count += 1
        number, size = self._count, storage.nbytes()
        self._numbers[address] = number
        self._named[number] = "attention" if _ATTENTION in name else self._component
        watcher = weakref.ref(storage, lambda _: self._forget(address, number, size))
        self._live[number] = size, watcher
        self._bytes += size
        if size < LARGE_BLOCK:
            self._in_heap += size
            self._trace.in_heap = max(self._trace.in_heap, self._in_heap)
        return True

    def _forget(self, address: int, number: int, size: int) -> None:
        self._numbers.pop(address, None)
        if self._live.pop(number, None) is not None:
            self._bytes -= size
            if size < LARGE_BLOCK:
                self._in_heap -= size

    def _note(self, inside: dict[str, int]) -> None:
        if kept := operators.kept_bytes():
            inside = {**inside, "matrices for gradients": kept}
        total = self._bytes + sum(inside.values())
        if total > self._most[self._phase]:
            self._most[self._phase] = total
            live = {number: size for number, (size, _) in self._live.items()}
            self._at_peak[self._phase] = live, inside


def _inside(name: str, args: Any, output: Any) -> tuple[int, int]:
    """Return the temporary bytes of an operator, and the bytes of dequantized weights that a CPU
    keeps allocated (`dispatch.scratch`)."""
    if name == "aten::logsumexp":  # exp(x - max)
        return args[0].untyped_storage().nbytes(), 0
    if not name.startswith("gptj8::frozen_linear"):
        return 0, 0
    is_forward = name == "gptj8::frozen_linear"
    x, codes = args[0], args[1]
    block_size, transposed = args[5:7] if is_forward else args[4:6]
    across = transposed if is_forward else not transposed
    dtype = dispatch.arithmetic_dtype(x)
    copies = 0 if dtype == x.dtype else (x.numel() + output.numel()) * dtype.itemsize
    if operators.is_multiplied_from_codes(x, codes, args[3], block_size, across):
        return copies, 0
    rows = operators.piece_rows(x, codes.shape, block_size, transposed)
    size, restored = dtype.itemsize, rows * codes.shape[1] * dtype.itemsize
    if is_forward or rows == codes.shape[0]:
        return copies, restored
    # A contiguous part of dy, its matrix product, the float32 sum; in another dtype also dy and a
    # wider output.
    part = x.numel() // codes.shape[0] * rows * size
    wider = size - x.element_size()
    converted = x.numel() * size + output.numel() * wider if wider else 0
    return part + output.numel() * (size + 4) + converted, restored


def _product(name: str, args: Any) -> dict[tuple[Any, ...], int]:
    """Return the key by which a matrix product is compiled, mapped to its second matrix's size."""
    if name.startswith("gptj8::frozen_linear"):
        x, right, transposed = args[0], args[1], args[6 if name == "gptj8::frozen_linear" else 5]
        return {(name, tuple(x.shape), tuple(right.shape), transposed): right.numel()}
    if name in _PRODUCTS:
        left, right = args[-2:] if name == "aten::addmm" else args[:2]
        return {(name, *((tuple(t.shape), t.stride()) for t in (left, right))): right.numel()}
    return {}


def _flops(name: str, args: Any, output: Any) -> int:
    """Return the multiplications and additions of a matrix product."""
    if name in ("gptj8::frozen_linear", "gptj8::frozen_linear_backward"):
        codes = args[1]
        side = args[0].shape[-1]
        return 2 * (args[0].numel() // side) * codes.numel()
    if name in _PRODUCTS:
        left = args[1] if name == "aten::addmm" else args[0]
        return 2 * output.numel() * left.shape[-1]
    if _ATTENTION in name:
        backward = "backward" in name
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        products = 5 if backward else 2
        return products * 2 * query.numel() * key.shape[-2]
    return 0
