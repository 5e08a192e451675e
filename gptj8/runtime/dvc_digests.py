"""List and hash files and folders as DVC does, with .dvcignore applied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec

IGNORE_FILE = ".dvcignore"
_NEVER_SEEN = (".git", ".hg", ".dvc")


def dvc_files(path: str | Path) -> list[Path]:
    """Return the file itself, or all files below a directory that DVC does not ignore, sorted.

    As in DVC, a symbolic link is followed if it is `path` itself or points to a file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    patterns = _patterns_above(path)
    if _is_ignored(path, True, patterns):  # a staging directory, hashed before it is renamed
        patterns = []
    return [Path(file) for file in sorted(_below(path, patterns), key=_as_path)]


def has_content(path: str | Path) -> bool:
    """Return whether a file, or one below a directory that DVC does not ignore, is not empty."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size > 0
    return any(os.stat(file).st_size for file in _below(path, _patterns_above(path)))


def dvc_digest(path: str | Path, known: MutableMapping[str, str] | None = None) -> str:
    """Return the digest of a file or directory as DVC writes it to dvc.lock.

    For a file this is its MD5. For a directory it is the MD5 of the listing of its files and their
    digests, followed by `.dir`.

    Args:
        path: a file or a directory.
        known: cache of digests by absolute path, size, modification time and inode. Files in the
            cache are not read; other files are added to it.
    """
    path = Path(path)
    if path.is_file():
        stat = path.stat()
        key = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        if known is not None and key in known:
            return known[key]
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, _md5).hexdigest()
        if known is not None:
            known[key] = digest
        return digest
    entries = [
        {"md5": dvc_digest(file, known), "relpath": file.relative_to(path).as_posix()}
        for file in dvc_files(path)
    ]
    entries.sort(key=lambda entry: entry["relpath"])
    listing = json.dumps(entries, sort_keys=True).encode()
    return f"{_md5(listing).hexdigest()}.dir"


def cache_folder(project: Path) -> Path:
    """Return the folder of DVC's cache, `cache.dir` of its configuration.

    Args:
        project: folder with `.dvc`.
    """
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        return Path(repo.cache.local_cache_dir)


def restore(digest: str, target: Path, cache: Path) -> bool:
    """Put a file or directory that DVC's cache has at a path; return False if it does not.

    Files are hard links where possible, so they must be read and never written.

    Args:
        digest: `dvc_digest` of the content.
        target: path that does not exist yet.
        cache: result of `cache_folder`.
    """
    source = _cached(digest, cache)
    if not source.is_file():
        return False
    if not digest.endswith(".dir"):
        _link(source, target)
        return True
    entries = json.loads(source.read_text(encoding="utf-8"))
    files = [(_cached(entry["md5"], cache), target / entry["relpath"]) for entry in entries]
    if not all(file.is_file() for file, _ in files):
        return False
    for file, place in files:
        _link(file, place)
    return True


def _cached(digest: str, cache: Path) -> Path:
    return cache / "files" / "md5" / digest[:2] / digest[2:]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


_Patterns = list[tuple[Path, GitIgnoreSpec]]


def _patterns_above(directory: Path) -> _Patterns:
    """Return the patterns of each .dvcignore from the project's root down to a directory."""
    folders = list(directory.absolute().parents)
    root = next((i for i, folder in enumerate(folders) if (folder / ".dvc").is_dir()), None)
    if root is None:  # not inside a DVC project
        return []
    # There is none further down: DVC rejects a dependency that contains a .dvcignore.
    files = [folder / IGNORE_FILE for folder in reversed(folders[: root + 1])]
    return [
        (file.parent, GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8").splitlines()))
        for file in files
        if file.is_file()
    ]


def _as_path(file: str) -> list[str]:
    """Return what sorts a file as `Path` does."""
    return file.split(os.sep)


def _below(directory: str | Path, patterns: _Patterns) -> Iterator[str]:
    """Yield the files below a directory; strings, because a folder may have 100,000 files."""
    with os.scandir(directory) as children:
        for child in children:
            is_folder = child.is_dir()
            if child.name in _NEVER_SEEN or _is_ignored(child.path, is_folder, patterns):
                continue
            if is_folder and not child.is_symlink():
                yield from _below(child.path, patterns)
            elif child.is_file():
                yield child.path


def _is_ignored(path: str | Path, is_folder: bool, patterns: _Patterns) -> bool:
    """Return whether the last pattern that matches a path ignores it."""
    ignored = False
    absolute = os.path.abspath(path)
    for folder, spec in patterns:
        name = absolute.removeprefix(f"{folder}{os.sep}").replace(os.sep, "/")
        found = spec.check_file(f"{name}/" if is_folder else name).include
        if found is not None:
            ignored = found
    return ignored
