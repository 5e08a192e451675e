"""Write and verify `manifest.json`, which has the SHA-256 of each file in a directory.

Neither safetensors nor Arrow streams have a checksum, so a flipped bit in a weight or a token loads
silently. Converted models, prepared datasets, adapters, exports and training checkpoints have a
manifest, and readers verify it before they use the files.
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
    """Write the manifest of `folder`.

    Args:
        folder: the directory.
        known: digests by relative path, for files that were already hashed.
        files: the files to list. None: all files below `folder`.
    """
    digests = {}
    for file in list_files(folder) if files is None else files:
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST:  # an earlier manifest does not list itself
            digests[name] = (known or {}).get(name) or sha256_file(file)
    write_json(folder / MANIFEST, digests)


def verify_manifest(folder: str | Path, only: Collection[str] | None = None) -> int | None:
    """Compare a directory with its manifest. Reads every byte of the compared files.

    Args:
        folder: the directory.
        only: relative paths of the files to compare. None: compare all files, and also report
            weight files that are not in the manifest.

    Returns:
        The number of files that match, or None if there is no manifest.

    Raises:
        UserError: one line per file that is altered, missing or, for weight files, not listed.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None
    expected = read_json(folder / MANIFEST)
    if not isinstance(expected, dict) or not all(
        isinstance(digest, str) and _is_inside(name) for name, digest in expected.items()
    ):
        raise UserError(f"{folder / MANIFEST} is not a manifest of digests by relative path")
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
            problems.append(f"{file} is missing but listed in {MANIFEST}")
            continue
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
            continue
        if actual != digest:
            problems.append(
                f"{file} was altered: its SHA-256 is {actual}, but {MANIFEST} has {digest}"
            )
    for file in list_files(folder) if only is None else ():
        name = file.relative_to(folder).as_posix()
        if file.suffix in _WEIGHT_SUFFIXES and name not in expected:
            problems.append(f"{file} is not in {MANIFEST}; it is not part of this model")
    if problems:
        raise UserError("\n".join(problems))
    return len(expected)


def _is_inside(name: str) -> bool:
    """Return whether a manifest's entry is a valid relative path below the folder."""
    try:
        if b"\0" in os.fsencode(name):
            return False
    except UnicodeEncodeError:  # a lone surrogate, which JSON allows
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
