"""What a training is at the end of a step, as plain JSON and named tensors.

Everything that decides how it goes on: trained weights, optimizer, scheduler, gradient scaler,
random number generators of Python, NumPy, torch and CUDA, and the sums that its figures are made
of. Nothing of it is pickled: reading it back runs no code.
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
    """Return nested dicts and lists as JSON has them; each tensor goes to `tensors`, by a name.

    Keys become strings and tuples lists; `from_plain` leaves them so.
    """
    if isinstance(value, torch.Tensor):
        # A copy: the file's writer refuses tensors that share memory, as 8-bit states' tables do.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return _TENSOR + name
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which has no place in a checkpoint")


def from_plain(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `to_plain` was given, but for types of keys and lists."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: from_plain(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item, tensors) for item in value]
    return value


def random_state() -> dict[str, Any]:
    """Return the state of every generator of random numbers that a training may draw from."""
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what `random_state` has returned, in this process or another."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state; of 8-bit ones codes, tables and scales as they are."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def set_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Give an optimizer of the same weights the state that `optimizer_state` has returned."""
    state = optimizer.state_dict()
    for group, values in zip(state["param_groups"], saved["param_groups"], strict=True):
        for key, value in values.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    state["state"] = {int(number): entry for number, entry in saved["state"].items()}
    optimizer.load_state_dict(state)
