"""Write files and directories atomically, read JSON, and compute checksums.

Every output is written next to its destination under a temporary name, flushed to disk and then
renamed, because a rename is atomic. The temporary name never looks like an output, so files left by
a killed process are not loaded by mistake.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line

_CHUNK_BYTES = 1 << 22


@contextmanager
def replace_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty staging directory that becomes `target` when the block ends without an error.

    An existing `target` stays readable until then. On an error the staging directory is removed and
    `target` is unchanged.

    Raises:
        UserError: if `target` is a file or a link.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is not a folder, but the output is one; move it away")
    staging = target.with_name(f".{target.name}.incomplete")
    discarded = target.with_name(f".{target.name}.replaced")
    if discarded.exists() and not target.exists():  # killed between the two renames
        discarded.rename(target)
    if staging.exists():  # left by a killed process
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        _share(staging)
        _flush_tree(staging)
        if target.exists():
            if discarded.exists():
                shutil.rmtree(discarded)
            target.rename(discarded)
            staging.rename(target)
            shutil.rmtree(discarded)
        else:
            staging.rename(target)
        _flush(target.parent)
    except BaseException:
        if discarded.exists() and not target.exists():
            discarded.rename(target)
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def temporary_sibling(target: str | Path, prefix: str) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which is deleted at the end.

    The parents of `target` are created first; after an error, those that were created are removed.

    Raises:
        UserError: if they cannot be created.
    """
    parent = Path(target).absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be created: {one_line(error)}") from error
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
            yield Path(name)
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def replace_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `target` when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.incomplete")
    try:
        yield staging
        _flush(staging)
        staging.replace(target)
        _flush(target.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. NaN and infinity raise ValueError."""
    with replace_file(path) as staging:
        staging.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if the file is missing or is not valid JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number that is too long
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None


def require_free_space(directory: str | Path, needed_bytes: int, purpose: str) -> None:
    """Raise an error before the work starts if its output would not fit on the disk.

    Raises:
        UserError: if the file system of `directory` has less than `needed_bytes` free.
    """
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{directory}: {purpose} needs {format_bytes(needed_bytes)}, and the disk has "
            f"{format_bytes(free)} free; make room or choose another disk"
        )


def format_bytes(count: float) -> str:
    """Return `count` bytes as text with a decimal unit, such as `6.06 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def list_files(path: str | Path) -> list[Path]:
    """Return the file itself, or all files below a directory, sorted by relative path."""
    path = Path(path)
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def hash_file(path: str | Path, *algorithms: str) -> dict[str, str]:
    """Return the digests of a file's bytes by algorithm, in hex."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            for digest in digests.values():
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    return hash_file(path, "sha256")["sha256"]


def _share(directory: Path) -> None:
    """Give files the default permissions of new files: safetensors makes them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in list_files(directory):
        path.chmod(0o666 & ~umask)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(directory: Path) -> None:
    for path in list_files(directory):
        _flush(path)
    _flush(directory)
