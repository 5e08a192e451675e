"""Estimate the peak memory of training and evaluation by component.

    training    = process + weights + adapter + optimizer + allocations of one micro-batch
    evaluation  = process + weights + adapter             + allocations of one forward pass

Weights, adapter and optimizer are counted on the model, built without weights. The allocations of a
step are recorded while it runs on tensors without memory (`gptj8.memory.trace`). All blocks of a
model allocate the same amounts, so a deep model is recorded at two small depths and each component
is extrapolated linearly.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gptj8.dataset.prepared.examples import padded_length
from gptj8.memory.skeleton import Weights, build, layers_of, weigh, with_layers
from gptj8.memory.trace import Batch, Trace, trace_evaluation, trace_training_step
from gptj8.model.adapters import AdapterSpec
from gptj8.model.scoring.batching import MAX_LOGITS, max_batch_tokens
from gptj8.model.scoring.perplexity import context_length
from gptj8.quantization.quantizer import Blockwise8bitConfig
from gptj8.runtime.process import COMPILED_PRODUCTS
from gptj8.training.activation_checkpointing import Kind
from gptj8.training.heap import large_blocks
from gptj8.training.packing import longest_sequence

if TYPE_CHECKING:
    from peft import PeftModel

    from gptj8.params.sections import Params

LARGEST_TRIED = 4096
"""The largest micro-batch size that `Estimator.largest_micro_batch` tries by itself."""

_LABEL_TOKENS = 8  # assumed for a label and its end token before the labels are known
# Depths recorded for deeper models; both even, because some architectures alternate two kinds.
_SHALLOW, _DEEP = 2, 4
# Unusable memory of glibc's heap between live tensors: for a small model a multiple of their size,
# for others 140 to 350 MiB, of which this is about the middle (measured for processes started by
# `restart_with_malloc_settings`).
_UNUSED = 2.5
_MOST_UNUSED = 210 << 20
# The same limit if the heap is trimmed, for large blocks that keep only their inputs
# (`gptj8.training.heap`; measured for GPT-J-6B's shape).
_MOST_UNUSED_TRIMMED = 64 << 20
# Memory that oneDNN keeps per compiled matrix product (measured with torch 2.13): code, and
# workspace that grows with the matrix.
_COMPILED = 700 << 10
_COMPILED_OF_LARGE = 4 << 20
_LARGE_MATRIX = 1 << 24


@dataclass(frozen=True)
class Plan:
    """Model and settings to estimate.

    Attributes:
        config: transformers' config of the model (`skeleton.read_config`).
        quantization: How the model is quantized.
        adapter: The adapter to train.
        dtype: Compute dtype.
        device: "cpu" or "cuda".
        length: Tokens of the longest row.
        learned: Positions per row that get logits in training.
        checkpointing: Default kind of activation checkpointing.
        optim: As in params.
        eval_rows: Maximum rows per forward pass of an evaluation.
        padded: Whether the rows of a batch differ in length.
        keeps_best: Whether training keeps a copy of the best adapter.
        packing: Whether training packs the rows of a micro-batch.
    """

    config: Any
    quantization: Blockwise8bitConfig
    adapter: AdapterSpec
    dtype: torch.dtype
    device: str
    length: int
    learned: int
    checkpointing: Kind = "full"
    optim: str = "adamw_bnb_8bit"
    eval_rows: int = 16
    padded: bool = True
    keeps_best: bool = False
    packing: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes by component, in display order, and their sum."""

    components: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Sum of all components in bytes."""
        return sum(self.components.values())


class Estimator:
    """Estimate memory for one plan and any micro-batch size.

    Args:
        plan: What is trained.
        process: Bytes that Python and the libraries use before a model is loaded. Ignored on a GPU,
            where only GPU memory is counted.

        on_step: Called with a description before each recorded step, to show progress.

    Attributes:
        weights: Sizes of the model's tensors.
    """

    def __init__(
        self, plan: Plan, process: int = 0, on_step: Callable[[str], object] = lambda what: None
    ) -> None:
        self.plan = plan
        self.process = process if plan.device == "cpu" else 0
        self._on_step = on_step
        model = self._build(layers_of(plan.config))
        self.weights: Weights = weigh(model, plan.optim)
        self._is_trimmed = bool(large_blocks(model))
        self._training = functools.cache(self._trace_training)
        self._step = functools.cache(self._trace_step)

    def training(self, micro_batch: int, checkpointing: Kind | None = None) -> Estimate:
        """Return the peak memory of training with the given micro-batch size."""
        kind = checkpointing or self.plan.checkpointing
        step = dict(self._training(micro_batch, kind, False))
        if self.plan.packing and micro_batch > 1:  # rows are padded if that costs less
            step = max(step, dict(self._training(micro_batch, kind, True)), key=_total)
        step.pop("gradients", None)
        return Estimate({**self._fixed_in_training(), **step})

    def evaluation(self) -> Estimate:
        """Return the peak memory of scoring every token of held-out rows with the tuned model."""
        plan = self.plan
        most = max_batch_tokens(torch.device(plan.device), plan.config.vocab_size)
        rows = max(1, min(plan.eval_rows, most // plan.length))
        return self.scoring(rows, plan.length)

    def scoring(self, rows: int, places: int) -> Estimate:
        """Return the peak memory of a forward pass with logits at `places` positions per row."""
        plan = self.plan
        most = max_batch_tokens(torch.device(plan.device), 1)
        rows = max(
            1, min(rows, most // plan.length, MAX_LOGITS // (places * plan.config.vocab_size))
        )
        batch = Batch(rows, plan.length, min(places, plan.length))

        def trace(layers: int) -> dict[str, int]:
            self._on_step("evaluation")
            return self._components(trace_evaluation(self._build(layers), batch))

        return Estimate({**self._fixed(), **_bounded(self._extrapolate(trace), _MOST_UNUSED)})

    def flops_per_token(self, checkpointing: Kind | None = None) -> float:
        """Return the floating-point operations of a training step per token."""
        # Equal to the micro-batch of one row in `training`, whose step is recorded only once.
        batch = Batch(1, self.plan.length, self.plan.learned, self.plan.padded)
        kind = checkpointing or self.plan.checkpointing
        found = self._extrapolate(lambda layers: {"flops": self._step(layers, batch, kind).flops})
        return found["flops"] / self.plan.length

    def largest_micro_batch(
        self,
        memory: int,
        candidates: Sequence[int] | None = None,
        checkpointing: Kind | None = None,
    ) -> int:
        """Return the largest micro-batch size that fits, or 0 if none fits.

        Args:
            memory: Available memory in bytes.
            candidates: Sizes to choose from, ascending; None: all up to `LARGEST_TRIED`.
            checkpointing: Kind of activation checkpointing; None: the plan's.
        """
        sizes = candidates or range(1, LARGEST_TRIED + 1)
        total = lambda index: self.training(sizes[index], checkpointing).total  # noqa: E731
        # No step has to be recorded for a model that does not fit by itself.
        if sum(self._fixed_in_training().values()) > memory or total(0) > memory:
            return 0
        # Memory grows almost linearly, so a line through two sizes gives a guess close to the
        # result. The result is exact, because the search ends only when the next size does not fit.
        low, high, other = 0, len(sizes), min(7, len(sizes) - 1)
        while low + 1 < high:
            rise = (total(other) - total(low)) / (sizes[other] - sizes[low]) if other != low else 0
            wanted = sizes[low] + (memory - total(low)) / rise if rise > 0 else sizes[high - 1]
            guess = bisect_right(sizes, wanted) - 1
            guess = max(low + 1, min(guess, high - 1))
            if total(guess) > memory:
                high = other = guess
                continue
            # Not the first size if there is another: a single row has no padding.
            other = other if low < other != guess else low
            low = guess
        return sizes[low]

    def _fixed(self) -> dict[str, int]:
        weights = self.weights
        return {
            "process and libraries": self.process,
            "8-bit weights": weights.codes,
            "absmax and codebooks": weights.scales,
            "unquantized weights": weights.unquantized,
            "adapter": weights.adapter,
        }

    def _fixed_in_training(self) -> dict[str, int]:
        """Return what training needs besides the allocations of a micro-batch."""
        fixed = self._fixed()
        fixed["optimizer"] = self.weights.optimizer
        # Training keeps a copy of the initial adapter to check that the weights changed, and of the
        # best one, next to the one that was the best at the last saved state.
        fixed["adapter"] += (3 if self.plan.keeps_best else 1) * self.weights.adapter
        fixed["gradients"] = self.weights.adapter
        return fixed

    def _build(self, layers: int) -> PeftModel:
        plan = self.plan
        config = plan.config
        if layers != layers_of(config):
            config = with_layers(config, layers)
        return build(config, plan.quantization, plan.dtype, plan.adapter)

    def _trace_step(self, layers: int, batch: Batch, checkpointing: Kind) -> Trace:
        self._on_step(f"micro-batch of {batch.rows:,}, checkpointing {checkpointing}")
        autocast = autocast_dtype(self.plan.dtype, self.plan.device, self.plan.adapter.method)
        model = self._build(layers)
        return trace_training_step(model, batch, checkpointing, autocast)

    def _trace_training(
        self, micro_batch: int, checkpointing: Kind, packed: bool
    ) -> dict[str, int]:
        plan = self.plan
        length = plan.length
        if plan.padded and micro_batch > 1:
            length = padded_length(length, context_length(plan.config), plan.device)
        batch = Batch(micro_batch, length, plan.learned, plan.padded)
        if packed:
            batch = _packed(batch, context_length(plan.config))
        is_dense = self._is_trimmed and checkpointing in ("full", "reuse")
        found = self._extrapolate(
            lambda layers: self._components(self._step(layers, batch, checkpointing))
        )
        return _bounded(found, _MOST_UNUSED_TRIMMED if is_dense else _MOST_UNUSED)

    def _extrapolate(self, trace: Callable[[int], dict[str, int]]) -> dict[str, int]:
        layers = layers_of(self.plan.config)
        if layers <= _DEEP:
            return trace(layers)
        shallow, deep = trace(_SHALLOW), trace(_DEEP)
        found = {}
        for name in deep:
            at_two = shallow.get(name, 0)
            slope = (deep[name] - at_two) / (_DEEP - _SHALLOW)
            found[name] = max(0, round(at_two + slope * (layers - _SHALLOW)))
        return found

    def _components(self, trace: Trace) -> dict[str, int]:
        """Return the components of the phase with the highest peak, and memory outside tensors."""
        totals = {phase: sum(peak.values()) for phase, peak in trace.peaks.items()}
        components = dict(trace.peaks[max(totals, key=totals.__getitem__)])
        components["dequantization"] = trace.workspace
        if self.plan.device == "cpu":
            components["compiled products"] = self._compiled(trace)
            components["unused heap"] = int(_UNUSED * trace.in_heap)
        return components

    def _compiled(self, trace: Trace) -> int:
        """Return the memory of oneDNN's compiled products; oneDNN is used only for 16 bits."""
        if self.plan.dtype == torch.float32 or not trace.products:
            return 0
        sizes = [
            _COMPILED + _COMPILED_OF_LARGE * min(size, _LARGE_MATRIX) // _LARGE_MATRIX
            for size in trace.products.values()
        ]
        kept = COMPILED_PRODUCTS if self.plan.padded else min(COMPILED_PRODUCTS, len(sizes))
        return kept * sum(sizes) // len(sizes)


def _packed(batch: Batch, context: int) -> Batch:
    """Return a batch of packed sequences that needs at least as much memory as any packed batch.

    Packed sequences have no more positions than the padded rows, but attention over longer
    sequences, and logits in all of them wherever one has a learned token.
    """
    longest = max(batch.length, longest_sequence(context))
    length = min(longest, batch.rows * batch.length)
    rows = -(-batch.rows * batch.length // length)
    learned = -(-(batch.rows**2) * batch.learned // rows)
    return Batch(rows, length, min(length, learned), packed=True)


def _total(components: dict[str, int]) -> int:
    return sum(size for name, size in components.items() if name != "gradients")


def _bounded(components: dict[str, int], most_unused: int) -> dict[str, int]:
    """Limit the unused heap, which stops growing with the model."""
    if "unused heap" in components:
        components["unused heap"] = min(components["unused heap"], most_unused)
    return components


def autocast_dtype(dtype: torch.dtype, device: str, method: str) -> torch.dtype | None:
    """Return the autocast dtype of training, or None if it runs without autocast."""
    if dtype == torch.float16 and device == "cuda":
        return torch.float16
    return torch.bfloat16 if dtype == torch.bfloat16 and method == "layernorm" else None


def plan_of(
    params: Params,
    config: Any,
    dtype: torch.dtype,
    device: str,
    length: int | None = None,
    learned: int | None = None,
) -> Plan:
    """Return the plan that params describe.

    Args:
        params: All params.
        config: From `skeleton.read_config`.
        dtype: Compute dtype.
        device: "cpu" or "cuda".
        length: Tokens of the longest row. None: `data.max_length`, limited by the model's context.
        learned: Learned tokens of the longest row. None: a few for a label, otherwise all tokens
            but the first.
    """
    finetune = params.finetune
    length = length or min(params.data.max_length, context_length(config))
    if learned is None:
        learned = _LABEL_TOKENS if params.data.task == "classification" else length - 1
    return Plan(
        config=config,
        quantization=Blockwise8bitConfig.from_params(params.quantization),
        adapter=AdapterSpec.from_params(finetune),
        dtype=dtype,
        device=device,
        length=length,
        learned=max(1, min(learned, length - 1)),
        checkpointing="full" if finetune.checkpointing == "auto" else finetune.checkpointing,
        optim=finetune.optim,
        eval_rows=params.evaluate.per_device_eval_batch_size,
        keeps_best=finetune.load_best,
        packing=finetune.packing and params.data.task != "text",
    )
