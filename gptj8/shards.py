"""The tensors of a checkpoint directory: read one at a time, written in files of bounded size.

safetensors and torch's own format, in one file or in shards with an index. Files of torch are read
as tensors only: no pickled code runs.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gptj8.errors import UserError
from gptj8.files import read_json, write_json

SHARD_BYTES = 1_000_000_000
"""A written file is closed before a tensor would make it larger; also what is held in memory."""

_INDEX = "model.safetensors.index.json"


class ShardedWeights:
    """The tensors of a checkpoint, in file order; iterating holds one tensor at a time."""

    def __init__(self, source: Path) -> None:
        self.files = _weight_files(source)
        self.is_safetensors = self.files[0].suffix == ".safetensors"
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file_of: dict[str, Path] = {}
        self.total_bytes = 0
        for file in self.files:
            with ExitStack() as stack:
                for name, tensor in self._open(file, stack):
                    shape, item_bytes = _shape_and_item_bytes(tensor)
                    self.shapes[name], self.file_of[name] = shape, file
                    self.total_bytes += math.prod(shape) * item_bytes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            with ExitStack() as stack:
                for name, tensor in self._open(file, stack):
                    yield name, tensor if isinstance(tensor, torch.Tensor) else tensor[:]

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one mapped file, as long as the object lives)
    def _load(self, file: Path) -> dict[str, Any]:
        return _load_torch_file(file)

    def read(self, wanted: str) -> torch.Tensor:
        """Return one tensor."""
        with ExitStack() as stack:
            for name, tensor in self._open(self.file_of[wanted], stack):
                if name == wanted:
                    return tensor if isinstance(tensor, torch.Tensor) else tensor[:]
        raise KeyError(wanted)

    def _open(self, file: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
        """Yield tensors, or slices that read nothing until they are indexed."""
        try:
            if self.is_safetensors:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():
                    yield name, opened.get_slice(name)
            else:
                yield from self._load(file).items()
        except pickle.UnpicklingError as error:
            raise UserError(f"{file} holds more than tensors and is not read") from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} cannot be read, it may be truncated: {reason}") from error


def _load_torch_file(file: Path) -> dict[str, Any]:
    try:
        # Mapped, so that only the tensor at hand is read.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # Files from before torch 1.6 cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True)


def _shape_and_item_bytes(tensor: Any) -> tuple[tuple[int, ...], int]:
    if isinstance(tensor, torch.Tensor):
        return tuple(tensor.shape), tensor.element_size()
    bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
    return tuple(tensor.get_shape()), bits.get(tensor.get_dtype(), 8) // 8


def _weight_files(source: Path) -> list[Path]:
    for single, index in (
        ("model.safetensors", _INDEX),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (source / single).is_file():
            return [source / single]
        if (source / index).is_file():
            mapping = read_json(source / index).get("weight_map")
            names = mapping.values() if isinstance(mapping, dict) else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise UserError(f"{source / index} has no weight_map")
            files = [source / name for name in sorted(set(names))]
            outside = [f for f in files if f.resolve().parent != source.resolve()]
            if outside:
                raise UserError(f"{source / index} names {outside[0]}, which is not in {source}")
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file} is listed in {index} and does not exist")
            return files
    raise UserError(f"{source} has neither model.safetensors nor pytorch_model.bin, sharded or not")


class ShardWriter:
    """Collect tensors into safetensors files of bounded size; their names need the final count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self._write()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        self._write()
        count = len(self.shards)
        if count == 1:
            self._shard_path(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / _INDEX, index)

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def _write(self) -> None:
        path = self._shard_path(len(self.shards))
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes files that only their owner can read
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0
