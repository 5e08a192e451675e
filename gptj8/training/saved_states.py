"""States of an unfinished training on the disk, to go on from after any interruption.

They lie outside DVC's outputs, which DVC removes before a stage runs, in a folder named by a digest
of all that decides the result: what was saved by another training is never looked at. A state is
written beside its place, flushed, named with the SHA-256 of its files and renamed; the two newest
are kept, and one that does not match its digests is passed over, and said.
"""

from __future__ import annotations

import fcntl
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
from gptj8.runtime.manifest import MANIFEST, verify_manifest, write_manifest
from gptj8.runtime.messages import one_line
from gptj8.runtime.project import BASE, DATASET, state_folder
from gptj8.training.state import Tensors, from_plain, to_plain

if TYPE_CHECKING:
    import torch

    from gptj8.params.sections import Finetune
    from gptj8.training.settings import TrainingSettings

STATE, TENSORS = "state.json", "tensors.safetensors"

_KEPT = 2
_FORGOTTEN_DAYS = 14
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "numpy")

# Params that decide how a training fits into memory, or goes on, and not what it learns.
_OF_MEMORY = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_batch_size",
    "checkpointing",
    "launcher",
    "save_minutes",
}


def training_key(decided_by: Mapping[str, Any], *inputs: Path) -> str:
    """Return the digest of what decides a training's result.

    Args:
        decided_by: settings, as JSON has them.
        inputs: files or folders that it reads.

    Raises:
        UserError: if an input does not exist.

    The versions of the libraries and the package's own source are part of it: after an update a
    training begins anew.
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
    """A state that was found.

    Attributes:
        step: after which it was saved.
        content: as given to `SavedStates.save`, with lists for tuples and strings for keys.
        folder: where it lies.
        age: seconds since it was saved.
    """

    step: int
    content: dict[str, Any]
    folder: Path
    age: float


class SavedStates:
    """The states of one training.

    Args:
        root: of all trainings.
        key: of this one, from `training_key`.
        every: seconds between two states; None: saved only when training is interrupted.
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
        """Return the states of the training that the stage `finetune` does, and of no other one.

        How a step's rows are divided, and what is computed again, may change when a training goes
        on: then it needs less memory.

        Args:
            finetune: the params' section.
            settings: what it comes to on this machine.
            device, dtype: of the arithmetic.
        """
        decided_by = finetune.model_dump(mode="json", exclude=_OF_MEMORY) | {
            "seed": settings.seed,
            "device": device.type,
            "dtype": str(dtype),
            "rows_a_step": settings.rows_a_step,
            "processes": process_count(),
        }
        inputs = (DATASET / MANIFEST, BASE / MANIFEST)
        minutes = finetune.save_minutes
        every = None if minutes is None else 60 * minutes
        return cls(state_folder() / "checkpoints", training_key(decided_by, *inputs), every)

    @property
    def is_due(self) -> bool:
        """Whether as much time has passed since the last state as is meant to be lost at most."""
        return self.every is not None and time.monotonic() - self._saved_at >= self.every

    @contextmanager
    def alone(self) -> Iterator[SavedStates]:
        """Keep other processes from the same training, which would write over each other's states.

        Of several processes that share a training, the main one does.

        Raises:
            UserError: if one is under way.
        """
        with ExitStack() as opened:
            from_main(lambda: self._lock(opened))
            yield self

    def _lock(self, opened: ExitStack) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        lock = opened.enter_context(open(self.root / f"{self.key[:16]}.lock", "w"))
        self._forget_the_old()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "the same training is under way in another process; wait for its end, or end it: "
                "this one would go on where it stopped"
            ) from None

    def latest(self) -> Saved | None:
        """Return the newest state that is as it was written; None if there is none."""
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
            raise UserError(f"{folder} was saved by another training")
        content = from_plain(plain["content"], load_file(folder / TENSORS))
        age = max(0.0, time.time() - (folder / STATE).stat().st_mtime)
        return Saved(int(plain["step"]), content, folder, age)

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write a state, then remove those before the last two, and those that were not usable.

        Args:
            step: after which it is.
            content: nested dicts and lists of numbers, strings and tensors.

        Raises:
            UserError: if the disk has no room for it; earlier states are as they were.
        """
        tensors: Tensors = {}
        plain = {"key": self.key, "step": step, "content": to_plain(content, "state", tensors)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        require_free_space(self.folder, size + (1 << 20), "a checkpoint")
        target = self.folder / f"step-{step:09d}"
        try:
            with replace_directory(target) as staging:
                # Infinity and NaN are what a scaled gradient's norm may be.
                (staging / STATE).write_text(json.dumps(plain), encoding="utf-8")
                save_file(tensors, staging / TENSORS)
                write_manifest(staging)
        except SafetensorError as error:  # no OSError, though the disk is what it tells of
            raise UserError(f"the checkpoint {target} is not written: {one_line(error)}") from error
        self._saved_at = time.monotonic()
        self._unusable.discard(target)
        # Of a later step is only what could not be gone on from.
        good = [f for f in self._folders() if f.name <= target.name and f not in self._unusable]
        for folder in self._folders():
            if folder not in good[-_KEPT:]:
                _remove(folder)
        return target

    def clear(self) -> None:
        """Remove all states: what they lead to is complete."""
        _remove(self.folder)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _forget_the_old(self) -> None:
        """Remove states of trainings that nobody has come back to."""
        limit = time.time() - _FORGOTTEN_DAYS * 86400
        for path in self.root.iterdir():
            with suppress(FileNotFoundError):  # another process forgets, or clears, too
                if path.is_dir() and path != self.folder and path.stat().st_mtime < limit:
                    _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder by another name: half removed it would look like one that is damaged."""
    if not folder.exists():
        return
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
