"""Save and load checkpoints of unfinished training, to resume after any interruption.

Checkpoints are stored outside DVC's outputs, because DVC removes those before a stage runs. Their
folder is named by a digest of everything that determines the result, so checkpoints of other
training runs are never read. A checkpoint is written to a temporary folder with a manifest of
SHA-256 checksums, flushed and then renamed. The two newest are kept. A checkpoint that does not
match its checksums is skipped with a warning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptj8.runtime.distributed import from_main, process_count
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, replace_directory, require_free_space, sha256_file
from gptj8.runtime.locks import locked
from gptj8.runtime.manifest import MANIFEST, verify_manifest, write_manifest
from gptj8.runtime.messages import one_line
from gptj8.runtime.project import BASE, DATASET, state_folder
from gptj8.training.state import Tensors, from_plain, to_plain

if TYPE_CHECKING:
    import torch

    from gptj8.params.sections import Finetune
    from gptj8.training.settings import TrainingSettings

STATE, TENSORS = "state.json", "tensors.safetensors"

_MAX_KEPT = 2
_STALE_DAYS = 14
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "numpy")

# Params that affect memory use or resuming, but not the trained weights.
_NOT_IN_KEY = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_batch_size",
    "checkpointing",
    "launcher",
    "save_minutes",
}


def training_key(decided_by: Mapping[str, Any], *inputs: Path) -> str:
    """Return a digest of everything that determines the result of training.

    The digest covers the library versions and this package's source, so training starts from the
    beginning after an update.

    Args:
        decided_by: Settings, as JSON values.
        inputs: Files or folders that training reads.

    Raises:
        UserError: If an input does not exist.
    """
    package = Path(__file__).parents[1]
    sources = [path for path in list_files(package) if path.suffix in (".py", ".c")]
    content = {
        "settings": dict(decided_by),
        "inputs": [_digests(path) for path in inputs],
        "code": {path.relative_to(package).as_posix(): sha256_file(path) for path in sources},
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(path: Path) -> dict[str, str]:
    if not path.exists():
        raise UserError(f"{path} does not exist; rerun the stage that writes it")
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in list_files(path)}


@dataclass(frozen=True)
class Saved:
    """A loaded checkpoint.

    Attributes:
        step: Step after which it was saved.
        content: As passed to `SavedStates.save`, but tuples are lists and keys are strings.
        folder: Folder of the checkpoint.
        age: Seconds since it was saved.
    """

    step: int
    content: dict[str, Any]
    folder: Path
    age: float


class SavedStates:
    """The checkpoints of one training run.

    Args:
        root: Folder for the checkpoints of all training runs.
        key: Key of this run, from `training_key`.
        every: Seconds between two checkpoints. None: save only when training is interrupted.
    """

    def __init__(self, root: Path, key: str, every: float | None) -> None:
        self.key, self.every = key, every
        self.root = root
        self.folder = root / key[:16]
        self._saved_at = time.monotonic()
        self._unusable: set[Path] = set()

    @classmethod
    def of_stage(
        cls,
        finetune: Finetune,
        settings: TrainingSettings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SavedStates:
        """Return the checkpoints that belong to this run of the stage `finetune`.

        The micro-batch size and activation checkpointing are not part of the key, so resumed
        training can use less memory.

        Args:
            finetune: The `finetune` section of params.
            settings: The resolved settings on this machine.
            device: Compute device.
            dtype: Compute dtype.
        """
        decided_by = finetune.model_dump(mode="json", exclude=_NOT_IN_KEY) | {
            "seed": settings.seed,
            "device": device.type,
            "dtype": str(dtype),
            "rows_per_step": settings.rows_per_step,
            "processes": process_count(),
        }
        inputs = (DATASET / MANIFEST, BASE / MANIFEST)
        minutes = finetune.save_minutes
        every = None if minutes is None else 60 * minutes
        return cls(state_folder() / "checkpoints", training_key(decided_by, *inputs), every)

    @property
    def is_due(self) -> bool:
        """Whether `every` seconds have passed since the last checkpoint."""
        return self.every is not None and time.monotonic() - self._saved_at >= self.every

    @contextmanager
    def alone(self) -> Iterator[SavedStates]:
        """Lock this training, so that no other run overwrites its checkpoints.

        In distributed training, the main process holds the lock.

        Raises:
            UserError: If the same training is already running.
        """
        with ExitStack() as opened:
            from_main(lambda: self._lock(opened))
            yield self

    def _lock(self, opened: ExitStack) -> None:
        file = self.root / f"{self.key[:16]}.lock"
        if not opened.enter_context(locked(file, wait=False)):
            raise UserError(
                "the same training is running in another process; wait for it, or stop it and "
                "rerun to resume from its last checkpoint"
            )
        self._remove_stale()

    def latest(self) -> Saved | None:
        """Return the newest undamaged checkpoint, or None if there is none."""
        for folder in reversed(self._folders()):
            try:
                return self._read(folder)
            except (UserError, OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                self._unusable.add(folder)
                _warn(f"the checkpoint {folder} is not used: {one_line(error)}")
        return None

    def _read(self, folder: Path) -> Saved:
        if verify_manifest(folder) is None:
            raise UserError(f"{folder} has no manifest")
        plain = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if plain["key"] != self.key:
            raise UserError(f"{folder} belongs to another training run")
        content = from_plain(plain["content"], load_file(folder / TENSORS))
        age = max(0.0, time.time() - (folder / STATE).stat().st_mtime)
        return Saved(int(plain["step"]), content, folder, age)

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove all but the last two and those that could not be loaded.

        Args:
            step: Step after which it is saved.
            content: Nested dicts and lists of numbers, strings and tensors.

        Raises:
            UserError: If the disk is full; existing checkpoints are not changed.
        """
        tensors: Tensors = {}
        plain = {"key": self.key, "step": step, "content": to_plain(content, "state", tensors)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        require_free_space(self.folder, size + (1 << 20), "a checkpoint")
        target = self.folder / f"step-{step:09d}"
        try:
            with replace_directory(target) as staging:
                # JSON with NaN and Infinity: the norm of scaled gradients may not be finite.
                (staging / STATE).write_text(json.dumps(plain), encoding="utf-8")
                save_file(tensors, staging / TENSORS)
                write_manifest(staging)
        except SafetensorError as error:  # safetensors raises this instead of OSError
            raise UserError(f"cannot write the checkpoint {target}: {one_line(error)}") from error
        self._saved_at = time.monotonic()
        self._unusable.discard(target)
        # Checkpoints of later steps are unusable; otherwise training would have resumed from them.
        good = [f for f in self._folders() if f.name <= target.name and f not in self._unusable]
        for folder in self._folders():
            if folder not in good[-_MAX_KEPT:]:
                _remove(folder)
        return target

    def clear(self) -> None:
        """Remove all checkpoints of this run; called when its result is complete."""
        _remove(self.folder)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _remove_stale(self) -> None:
        """Remove checkpoints of other runs that have not changed for `_STALE_DAYS` days."""
        limit = time.time() - _STALE_DAYS * 86400
        for path in self.root.iterdir():
            with suppress(FileNotFoundError):  # another process may remove it at the same time
                if path.is_dir() and path != self.folder and path.stat().st_mtime < limit:
                    _remove(path)


def _remove(folder: Path) -> None:
    """Rename a folder and then remove it, so that a partly removed one does not look damaged."""
    if not folder.exists():
        return
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
