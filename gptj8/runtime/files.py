"""Files that are either whole or absent, and digests of what was read.

Every output is written beside its destination under a temporary name, flushed to the disk and then
renamed, because a rename is the only step that a crash cannot split. A temporary name never looks
like an output, so what a killed process leaves behind is neither loaded nor mistaken for one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line

_CHUNK_BYTES = 1 << 22


@contextmanager
def replace_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty staging directory that becomes `target` when the block ends without an error.

    An earlier `target` stays readable until then. On an error the staging directory is removed and
    `target` is as it was.

    Raises:
        UserError: if `target` is a file or a link.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is not a folder, and would be replaced by one; move it away")
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
    """Write `content` as indented JSON, whole or not at all. NaN and infinity are refused."""
    with replace_file(path) as staging:
        staging.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write dicts as CSV, whole or not at all; the columns are the keys in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (
        replace_file(path) as staging,
        open(staging, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if the file is absent or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder") from None
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None


def require_free_space(directory: str | Path, needed_bytes: int, purpose: str) -> None:
    """Refuse before the work starts what the disk could not hold at its end.

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
    """Return `count` bytes with a decimal unit, as disks and file managers count: `6.06 GB`."""
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


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _share(directory: Path) -> None:
    """Give files the permissions that the user's new files have: safetensors makes them private."""
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
