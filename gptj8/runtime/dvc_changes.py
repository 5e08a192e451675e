"""Explain why DVC runs a stage, by comparing the project with the stage's entry in dvc.lock.

DVC itself prints no reason. While a stage runs, dvc.lock still has the entry of its last run, and
already has the new entries of the stages before it. Params and file digests are compared directly.
A directory that is not an output of a stage in the same dvc.lock is compared by the size and number
of its files. Its digest is computed only if it is small: hashing 12 GB would delay the stage by a
minute. A directory too large to hash is reported as a possible change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj8.runtime.dvc_digests import dvc_digest, dvc_files
from gptj8.runtime.project import project_root

FIRST = "first run"
"""The reason for a stage without an entry in dvc.lock."""

NOT_MADE = "not made yet"
"""The command in the dvc.lock of a recipe that has not run; see data/README.md."""

FIRST_IN_COPY = "runs in an experiment's copy, which has no dvc.lock from an earlier run"
"""The same reason inside the copy that `dvc exp run --temp` makes of the files tracked by git.
dvc.lock may not be one of them."""

_MOST_BYTES = 64 << 20  # the largest directory that is hashed
_SHOWN = 3
_TEMPLATE = re.compile(r"\$\{([\w.]+)\}")
_MISSING = object()


def explain(stage: str, folder: str | Path = ".") -> str:
    """Return one line with the reason why a stage of the dvc.yaml in `folder` runs.

    Never raises: the stage itself reports a project that cannot be read.
    """
    folder = Path(folder)
    try:
        locked = (_read(folder / "dvc.lock") or {}).get("stages", {})
        if locked.get(stage, {}).get("cmd", NOT_MADE) == NOT_MADE:
            return FIRST if project_root() == Path.cwd().resolve() else FIRST_IN_COPY
        declared = _read(folder / "dvc.yaml")["stages"][stage]
        changes = list(_changes(folder, locked[stage], declared, locked))
    except Exception:  # a file is missing or was not written by DVC
        return "runs"
    certain = [text for text, is_certain in changes if is_certain]
    if certain:
        more = f" and {len(certain) - _SHOWN} more" if len(certain) > _SHOWN else ""
        return f"runs because {', '.join(certain[:_SHOWN])}{more}"
    possible = "".join(f", or {text}" for text, _ in changes)
    return f"rerun: forced, or its outputs were changed{possible}"


def _changes(
    folder: Path, locked: Mapping[str, Any], declared: Mapping[str, Any], stages: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """Yield a description of each change and whether it is certain."""
    if locked.get("cmd") != declared.get("cmd"):
        yield "its command changed", True
    values = _read(folder / "params.yaml") or {}
    for text in _changed_params(folder, locked, declared):
        yield text, True
    before = {os.path.normpath(entry["path"]): entry for entry in locked.get("deps", ())}
    outs = (out for entry in stages.values() for out in entry.get("outs", ()))
    made = {os.path.normpath(out["path"]): out["md5"] for out in outs}
    paths = [_resolve(dep, values) for dep in declared.get("deps", ())]
    for path in paths:
        if path not in before:
            yield f"{path} is a new dependency", True
            continue
        is_changed = _is_changed(folder / path, before[path], made.get(path))
        if is_changed is None:
            yield f"something in {path} changed", False
        elif is_changed:
            yield f"{path} changed", True
    for path in before:
        if path not in paths:
            yield f"{path} is no longer a dependency", True


def _changed_params(
    folder: Path, locked: Mapping[str, Any], declared: Mapping[str, Any]
) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for entry in declared.get("params", ()):
        for file, keys in (
            entry.items() if isinstance(entry, Mapping) else [("params.yaml", [entry])]
        ):
            names.setdefault(file, []).extend(keys or ())
    for file, keys in names.items():
        before = (locked.get("params") or {}).get(file) or {}
        values = _read(folder / file) or {}
        for key in keys:
            yield from _differences(key, before.get(key, _MISSING), _value(values, key))


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from _differences(
                f"{name}.{key}", before.get(key, _MISSING), now.get(key, _MISSING)
            )
    elif before is now:
        return
    elif before is _MISSING:
        yield f"{name} is {_text(now)} (was not set)"
    elif now is _MISSING:
        yield f"{name} was removed (was {_text(before)})"
    elif before != now:
        yield f"{name} is {_text(now)} (was {_text(before)})"


def _is_changed(path: Path, before: Mapping[str, Any], made: str | None) -> bool | None:
    """Return whether a dependency changed, or None if finding out would take too long."""
    if before.get("hash") != "md5":  # the digests of DVC before version 3
        return None
    if made is not None:
        return made != before["md5"]
    if not path.exists():
        return True
    files = dvc_files(path)
    size = sum(file.stat().st_size for file in files)
    if size != before.get("size") or (path.is_dir() and len(files) != before.get("nfiles")):
        return True
    if size > _MOST_BYTES:
        return None
    return dvc_digest(path) != before["md5"]


def _read(path: Path) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(path) if path.is_file() else None


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _MISSING
        values = values[part]
    return values


def _resolve(dep: Any, values: Any) -> str:
    """Return a dependency's path with its `${...}` templates filled in from the params."""
    path = dep if isinstance(dep, str) else next(iter(dep))
    return os.path.normpath(_TEMPLATE.sub(lambda match: str(_value(values, match[1])), path))


def _text(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
