"""What a directory held when it was written: a SHA-256 for each file, in `manifest.json`.

safetensors has no checksum, and neither have Arrow's streams: a flipped bit in a weight or in a
token loads without a word. Converted models, prepared datasets, adapters, exports and checkpoints
of training carry this manifest, and whoever reads one compares before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, read_json, sha256_file, write_json

MANIFEST = "manifest.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def write_manifest(
    folder: Path,
    known: Mapping[str, str] | None = None,
    files: Iterable[Path] | None = None,
) -> None:
    """Record what is below `folder`.

    Args:
        known: digests by relative path of files that were hashed as they were written.
        files: record these alone; None: all.
    """
    digests = {}
    for file in list_files(folder) if files is None else files:
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST:  # of before
            digests[name] = (known or {}).get(name) or sha256_file(file)
    write_json(folder / MANIFEST, digests)


def verify_manifest(folder: str | Path, only: Collection[str] | None = None) -> int | None:
    """Compare a directory with its manifest; all bytes of what is compared are read.

    Args:
        folder: the directory.
        only: compare these files, by relative path, and no others; None: all, and look for weights
            that it does not list.

    Returns:
        how many files are as they were written; None where there is no manifest.

    Raises:
        UserError: a line for each file that is altered, missing or, if it holds weights, added.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None
    expected = read_json(folder / MANIFEST)
    if not isinstance(expected, dict) or not all(
        isinstance(digest, str) and _is_inside(name) for name, digest in expected.items()
    ):
        raise UserError(f"{folder / MANIFEST} is no manifest: digests by relative path")
    problems = []
    if only is not None:
        problems = [
            f"{folder / name} is not in {MANIFEST}" for name in only if name not in expected
        ]
        expected = {name: digest for name, digest in expected.items() if name in only}
    for name, digest in expected.items():
        file = folder / name
        try:
            actual = sha256_file(file)
        except FileNotFoundError:
            problems.append(f"{file} is missing; {MANIFEST} lists it")
            continue
        except OSError as error:
            problems.append(f"{file} cannot be read ({error.strerror}); {MANIFEST} lists it")
            continue
        if actual != digest:
            problems.append(
                f"{file} was altered: its SHA-256 is {actual}, and {MANIFEST} says {digest}"
            )
    for file in list_files(folder) if only is None else ():
        name = file.relative_to(folder).as_posix()
        if file.suffix in _WEIGHT_SUFFIXES and name not in expected:
            problems.append(f"{file} is not in {MANIFEST}; it is no part of this model")
    if problems:
        raise UserError("\n".join(problems))
    return len(expected)


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file below the folder, if it can be one at all."""
    try:
        if b"\0" in os.fsencode(name):
            return False
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
