"""Convert the state of training to plain JSON and named tensors, and back.

The state is everything that the following steps depend on: trained weights, optimizer, scheduler,
gradient scaler, random number generators of Python, NumPy, torch and CUDA, and the sums behind the
metrics. It contains no pickles, so loading it runs no code.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

_TENSOR = "tensor:"


def to_plain(value: Any, name: str, tensors: Tensors) -> Any:
    """Return nested dicts and lists as JSON values, and store each tensor in `tensors` by name.

    Keys become strings and tuples become lists; `from_plain` does not convert them back.
    """
    if isinstance(value, torch.Tensor):
        # A copy, because safetensors rejects tensors that share memory, as the quantization tables
        # of 8-bit optimizer states do.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return _TENSOR + name
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot store")


def from_plain(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value passed to `to_plain`, except that keys are strings and tuples are lists."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: from_plain(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item, tensors) for item in value]
    return value


def random_state() -> dict[str, Any]:
    """Return the state of every random number generator that training may use."""
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to a state from `random_state`, of this process or another."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state; 8-bit states are returned as codes, tables and scales."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def set_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state from `optimizer_state` into an optimizer of the same weights."""
    state = optimizer.state_dict()
    for group, values in zip(state["param_groups"], saved["param_groups"], strict=True):
        for key, value in values.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    state["state"] = {int(number): entry for number, entry in saved["state"].items()}
    optimizer.load_state_dict(state)
