"""Prove on a small copy of a model that its 8-bit form computes the same as the restored weights.

The copy has the classes and settings of the model, with random weights, fewer layers and heads, and
a small vocabulary. Its frozen modules are compared with ordinary ones that hold the restored
weights: outputs, and gradients of one step. This finds models that use a frozen module's weight in
a way that raises no error, such as casting a factor to its dtype.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptj8.quantization.layers import CodesUsedAsWeightsError, Frozen8bitModule
from gptj8.quantization.quantizer import (
    Blockwise8bitConfig,
    quantize_for,
    restore_modules,
    swap_modules,
)
from gptj8.runtime.messages import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 128
_TOLERANCE = 1e-3  # relative; sums in another order differ by 1e-6
_INNER_WIDTHS = ("intermediate", "inner", "ffn", "d_ff")
_LARGEST = 100_000_000  # parameters of a copy


class NotProvenError(Exception):
    """No small copy can be built or run; the message is the reason."""


def difference(model: PreTrainedModel, config: Blockwise8bitConfig) -> str | None:
    """Return in what a model's 8-bit form differs from the restored weights, or None.

    Args:
        model: any model with the config to prove, for example on the meta device.

    Raises:
        NotProvenError: if no copy can be built and run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices are too small for more, which would wait for each other
    try:
        return _difference(model, config)
    finally:
        torch.set_num_threads(threads)


def _difference(model: PreTrainedModel, config: Blockwise8bitConfig) -> str | None:
    ids = torch.randint(2, VOCABULARY - 2, (2, 12), generator=torch.Generator().manual_seed(0))
    small = build_small_copy(model, ids)
    try:
        frozen = _quantized(small, config)
        twin = restore_modules(copy.deepcopy(frozen), torch.float32)
        expected = _step(twin, ids)
    except Exception as error:  # any architecture, with any reason not to train as it is
        raise NotProvenError(f"{type(error).__name__}: {one_line(error)}") from error
    entered: list[str] = []
    try:
        actual = _step(frozen, ids, entered)
    except Exception as error:  # any architecture, with any reason not to run in 8 bits
        if isinstance(error, CodesUsedAsWeightsError):
            used = (n for n, m in frozen.named_modules() if getattr(m, "weight", 0) is error.codes)
            return f"computes with the weight of {next(used, entered[-1])} itself"
        return f"cannot run in 8 bits: {entered[-1]} raises {type(error).__name__}"
    for name, value in expected.items():
        if not _equal(actual.get(name), value):
            return f"computes something else in 8 bits, first in {name or 'the model itself'}"
    return None


def build_small_copy(model: PreTrainedModel, ids: torch.Tensor) -> PreTrainedModel:
    """Return the smallest model of the same class that can run: float32, on the CPU, in eval mode.

    Args:
        ids: int64 (batch, tokens), below `VOCABULARY`.

    Raises:
        NotProvenError: if there is none.
    """
    reason = ""
    for factor in _factors(model.config):
        config = copy.deepcopy(model.config)
        try:
            shrink(config, factor)
            with torch.device("meta"):
                parameters = type(model)(copy.deepcopy(config)).num_parameters()
            if parameters > _LARGEST:
                reason = reason or f"it has {parameters:,} parameters"
                continue
            small = _with_random_weights(type(model), config)
            with torch.no_grad():
                logits = small(input_ids=ids, use_cache=False).logits
            if bool(torch.isfinite(logits).all()):
                return small
            reason = reason or "its outputs are not finite"
        except Exception as error:  # any architecture, with any reason not to be built small
            reason = reason or f"{type(error).__name__}: {one_line(error)}"
    raise NotProvenError(reason)


def _with_random_weights(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small = kind(config).float().eval()
        for parameter in small.parameters():  # zeros and ones would hide errors
            if parameter.is_floating_point():
                parameter.data += 0.02 * torch.randn(parameter.shape)
    return small


def _factors(config: Any) -> list[int]:
    """Return the numbers by which all numbers of heads can be divided, the largest first."""
    heads = getattr(config, "num_attention_heads", None)
    key_heads = getattr(config, "num_key_value_heads", None)
    common = heads if isinstance(heads, int) else 1
    if isinstance(key_heads, int) and key_heads > 1:
        common = math.gcd(common, key_heads)
    return [factor for factor in range(common, 0, -1) if common % factor == 0]


def shrink(config: Any, factor: int) -> None:
    """Change a config in place: two layers, fewer heads, and a small vocabulary.

    The width per head stays, and with it all settings that depend on it. There are more layers if
    a model has different kinds of them.

    Args:
        factor: what the numbers of heads and the width are divided by.
    """
    if factor > 1:
        config.num_attention_heads //= factor
        if isinstance(getattr(config, "num_key_value_heads", None), int):
            config.num_key_value_heads = max(config.num_key_value_heads // factor, 1)
        config.hidden_size //= factor
    kinds = getattr(config, "layer_types", None)
    layers = min(2, getattr(config, "num_hidden_layers", 2))
    if kinds:
        layers = max(layers, 1 + max(kinds.index(kind) for kind in set(kinds)))
        with contextlib.suppress(AttributeError):  # some configs derive it from the other settings
            config.layer_types = kinds[:layers]
    config.num_hidden_layers = layers
    config.vocab_size = VOCABULARY
    for name, value in list(vars(config).items()):
        if not isinstance(value, int):
            continue
        if "vocab_size" in name:
            setattr(config, name, VOCABULARY)
        elif name.endswith("_token_id") and value >= VOCABULARY:
            setattr(config, name, VOCABULARY - 1)
        elif any(part in name for part in _INNER_WIDTHS) and value % factor == 0:
            setattr(config, name, value // factor)


def _quantized(model: PreTrainedModel, config: Blockwise8bitConfig) -> PreTrainedModel:
    before = dict(model.named_modules())
    for name in swap_modules(model, config, torch.float32):
        module, original = model.get_submodule(name), before[name]
        assert isinstance(module, Frozen8bitModule)
        weight: Any = original.weight
        if module.input_scales is not None:
            columns = torch.arange(len(module.input_scales))
            module.input_scales = torch.exp2(columns % 3 - 1.0)
        module.load_quantized(quantize_for(module, weight, config, name))
        if getattr(original, "bias", None) is not None:
            module.bias = original.bias
    return model.eval()


def _step(
    model: PreTrainedModel, ids: torch.Tensor, entered: list[str] | None = None
) -> dict[str, Any]:
    """Return the outputs of all modules in the order of their execution, and the gradient that
    arrives at the embedding after it has passed through all layers.

    Args:
        entered: receives the names of the modules that are called, in order.
    """
    found: dict[str, Any] = {}
    start: list[torch.Tensor] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            value = getattr(value, "logits", value)
            if isinstance(value, torch.Tensor):
                found.setdefault(name, value.detach())

        return hook

    def begin(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        start.append(output.detach().requires_grad_(True))
        return start[-1].clone()  # the model may change it in place

    # Not tables without parameters: a model may call one several times, in the order of a set.
    hooks = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
    ]
    names = [] if entered is None else entered
    for name, module in model.named_modules():
        enter = functools.partial(lambda name, *_: names.append(name), name or "the model itself")
        hooks.append(module.register_forward_pre_hook(enter))
    hooks.append(model.get_input_embeddings().register_forward_hook(begin))
    try:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        for hook in hooks:
            hook.remove()
    (found["the gradients"],) = torch.autograd.grad(loss, start[:1])
    return found


def _equal(actual: Any, expected: Any) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE * expected.float().norm())
