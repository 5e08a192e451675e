"""Read the tensors of a checkpoint one at a time, and write tensors to files of bounded size.

Reads safetensors and torch files, as a single file or as shards with an index. torch files are
loaded with `weights_only`, so no pickled code is executed.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import read_json, sha256_file, write_json
from gptj8.runtime.messages import counted, one_line

SHARD_BYTES = 400_000_000
"""Maximum size of a file, unless a single tensor is larger. Up to two files are held in memory."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes of weights. 8-bit floats are not among them: their scales are
tensors of their own."""

_INDEX = "model.safetensors.index.json"


# What training programs put before the names of tensors: DataParallel, torch.compile, and
# Lightning, whose module holds the model as an attribute.
_WRAPPERS = ("module.", "_orig_mod.")
_OWNER = "model."
# Keys under which training programs store a state dict beside other things.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")


class ShardedWeights:
    """The tensors of a checkpoint in file order; iteration reads one tensor at a time.

    Checkpoints that training programs wrote around a model are read, too: the state dict is an
    entry of the file, or names have a prefix.

    Attributes:
        is_wrapped: whether transformers cannot read the names as they are in the files.
        dtypes: names of the stored dtypes, as safetensors or torch call them.
    """

    def __init__(self, source: Path) -> None:
        self.files = _weight_files(source)
        self.is_safetensors = self.files[0].suffix == ".safetensors"
        self.is_wrapped = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.file_of: dict[str, Path] = {}
        self.total_bytes = 0
        self._unmapped: dict[Path, dict[str, torch.Tensor]] = {}
        for file in self.files:
            for name, tensor in self._open(file).items():
                shape, item_bytes = _shape_and_item_bytes(tensor)
                self.shapes[name], self.file_of[name] = shape, file
                self.dtypes[name] = _dtype_name(tensor)
                self.total_bytes += math.prod(shape) * item_bytes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.shapes:
            yield name, self.read(name)

    def require_floats(self, source: Path) -> None:
        """Raise UserError if weights are stored in 8-bit floats or integers.

        Their scales are other tensors, so the weights by themselves are meaningless.
        """
        known = {*FLOATS, "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
        names = [
            name
            for name, dtype in self.dtypes.items()
            if dtype not in known and name.endswith("weight") and len(self.shapes[name]) == 2
        ]
        if names:
            raise UserError(
                f"{source}: {counted(len(names), 'tensor')} such as {names[0]} have the dtype "
                f"{self.dtypes[names[0]]}, not floating-point weights; if they are 8-bit floats, "
                "load the model with transformers and FineGrainedFP8Config(dequantize=True), save "
                "it, and use that"
            )

    def lazily(self) -> dict[str, Any]:
        """Return tensors, or slices that are read when they are indexed, by name."""
        opened = {file: self._open(file) for file in self.files}
        return {name: opened[file][name] for name, file in self.file_of.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, memory-mapped if the format supports it."""
        # Open the file for each tensor: the pages of a mapped file count as resident memory until
        # the mapping is closed, and one file may contain the complete model.
        tensor = self._open(self.file_of[name])[name]
        if isinstance(tensor, torch.Tensor):
            return tensor
        return tensor[:] if tensor.get_shape() else tensor[...]

    def _open(self, file: Path) -> Mapping[str, Any]:
        """Return the tensors of a file by name, or slices that are read when they are indexed."""
        if file in self._unmapped:
            return self._unmapped[file]
        try:
            if self.is_safetensors:
                opened = safe_open(file, framework="pt")
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                return self._unwrapped(slices, file)
            try:
                return self._tensors_of(
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True), file
                )
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
            # Files from before torch 1.6 cannot be memory-mapped, so they are read once and kept.
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            self._unmapped = {file: self._tensors_of(loaded, file)}
            return self._unmapped[file]
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{file} contains objects other than tensors and is not loaded; save only the "
                "model's state dict"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            reason = one_line(error)
            raise UserError(f"{file} cannot be read; it may be truncated: {reason}") from error

    def _tensors_of(self, loaded: Any, file: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a loaded torch file."""
        while isinstance(loaded, dict):
            inner = [loaded[key] for key in _STATE_KEYS if isinstance(loaded.get(key), dict)]
            if not inner:
                break
            self.is_wrapped, loaded = True, inner[0]
        return self._unwrapped(_dense_tensors(loaded, file), file)

    def _unwrapped(self, tensors: dict[str, Any], file: Path) -> dict[str, Any]:
        """Return the tensors with the names that the model itself gave them."""
        names = {name: _without_wrappers(name) for name in tensors}
        inner = {name.removeprefix(_OWNER) for name in names.values()}
        if all(name.startswith(_OWNER) for name in names.values()) and any(
            name.startswith((_OWNER, "transformer.", "lm_head.")) for name in inner
        ):
            names = {old: new.removeprefix(_OWNER) for old, new in names.items()}
        if len(set(names.values())) < len(names):
            twice = Counter(names.values()).most_common(1)[0][0]
            found = " and ".join(old for old, new in names.items() if new == twice)
            raise UserError(f"{file} has the tensor {twice} twice: as {found}; remove one of them")
        self.is_wrapped |= any(old != new for old, new in names.items())
        return {names[old]: tensor for old, tensor in tensors.items()}


def _without_wrappers(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype) if isinstance(tensor, torch.Tensor) else tensor.get_dtype()


def _dense_tensors(loaded: Any, file: Path) -> dict[str, torch.Tensor]:
    """Return the loaded object, or raise UserError if it is not a state dict of dense tensors."""
    if not isinstance(loaded, dict):
        raise UserError(
            f"{file} contains a {type(loaded).__name__}, not a state dict; save only the model's "
            "state dict"
        )
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{file}: the entry {name!r} ({type(value).__name__}) is not a named tensor; save "
                "only the model's state dict"
            )
        if value.layout != torch.strided:
            raise UserError(f"{file}: {name} is not a dense tensor ({value.layout})")
    return loaded


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
            content = read_json(source / index)
            mapping = content.get("weight_map") if isinstance(content, dict) else None
            names = mapping.values() if isinstance(mapping, dict) else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise UserError(f"{source / index} has no weight_map")
            files = [source / name for name in sorted(set(names))]
            # Check names, not resolved paths: the Hub's cache links its files to another directory.
            outside = [name for name in names if len(PurePath(name).parts) != 1 or name == ".."]
            if outside:
                raise UserError(f"{source / index} lists {outside[0]!r}, which is not in {source}")
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file} is listed in {index} but does not exist")
            return files
    raise UserError(f"{source} has neither model.safetensors nor pytorch_model.bin, sharded or not")


class ShardWriter:
    """Write tensors to safetensors files of bounded size.

    A file is written in the background while the tensors of the next one are collected. Use it as a
    context manager: after an error in its body or in a write, no more files are written.

    Attributes:
        digests: SHA-256 of each file by name; complete after `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self.digests: dict[str, str] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._writes: list[Future[str]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.shutdown(cancel_futures=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; it must not be modified until it is written."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self._write()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write the remaining tensors, give the files their final names, and write the index."""
        self._write()
        digests = [write.result() for write in self._writes]
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            if count == 1:
                final = "model.safetensors"
            self._shard_path(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
            self.digests[final] = digests[number]
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / _INDEX, index)

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def _write(self) -> None:
        if self._writes:  # keeps at most two shards in memory and raises errors of the last write
            self._writes[-1].result()
        path = self._shard_path(len(self.shards))
        self.shards.append(list(self.pending))
        self._writes.append(self._background.submit(_save, self.pending, path))
        self.pending, self.pending_bytes = {}, 0


def _save(tensors: dict[str, torch.Tensor], path: Path) -> str:
    """Write a file and return its SHA-256."""
    save_file(tensors, path, metadata={"format": "pt"})
    tensors.clear()  # the future would keep them in memory
    path.chmod(0o644)  # safetensors creates files that only their owner can read
    return sha256_file(path)
