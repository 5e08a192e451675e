"""Why DVC runs a stage, which it does not say: what differs from what dvc.lock has of its last run.

While a stage runs, dvc.lock still has the entry of its last run, and the new ones of the stages
before it. Params and the digests of files are compared as they are. A directory that is not an
output of a stage in the same dvc.lock is compared by the size and number of its files, and by its
digest only where that is read in an instant: nobody waits a minute for twelve gigabytes to be told
what they know. What cannot be told so is named as what it may be.
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
"""What is said of a stage that dvc.lock does not know."""

NOT_MADE = "not made yet"
"""The command in the dvc.lock of a recipe that has not run: see data/README.md."""

FIRST_IN_COPY = "runs in an experiment's copy, which has no dvc.lock of an earlier run"
"""The same, in the copy that `dvc exp run --temp` makes of what git knows: dvc.lock may not be of
it."""

_MOST_BYTES = 64 << 20  # of a directory that is read for its digest
_SHOWN = 3
_TEMPLATE = re.compile(r"\$\{([\w.]+)\}")
_MISSING = object()


def explain(stage: str, folder: str | Path = ".") -> str:
    """Return one line that says why a stage of the dvc.yaml in `folder` runs.

    Never fails: a project that cannot be read is told by what reads it in earnest.
    """
    folder = Path(folder)
    try:
        locked = (_read(folder / "dvc.lock") or {}).get("stages", {})
        if locked.get(stage, {}).get("cmd", NOT_MADE) == NOT_MADE:
            return FIRST if project_root() == Path.cwd().resolve() else FIRST_IN_COPY
        declared = _read(folder / "dvc.yaml")["stages"][stage]
        changes = list(_changes(folder, locked[stage], declared, locked))
    except Exception:  # a file that is missing, or is not what DVC writes
        return "runs"
    certain = [text for text, is_certain in changes if is_certain]
    if certain:
        more = f" and {len(certain) - _SHOWN} more" if len(certain) > _SHOWN else ""
        return f"runs because {', '.join(certain[:_SHOWN])}{more}"
    possible = "".join(f", or {text}" for text, _ in changes)
    return f"runs again: it was asked to, or its outputs were not as it left them{possible}"


def _changes(
    folder: Path, locked: Mapping[str, Any], declared: Mapping[str, Any], stages: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """Yield what differs, in words, and whether that is certain."""
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
            yield f"{path} is no dependency any more", True


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
        yield f"{name} is {_text(now)} (was not there)"
    elif now is _MISSING:
        yield f"{name} is gone (was {_text(before)})"
    elif before != now:
        yield f"{name} is {_text(now)} (was {_text(before)})"


def _is_changed(path: Path, before: Mapping[str, Any], made: str | None) -> bool | None:
    """Whether a dependency is another than it was; None: that would take too long to tell."""
    if before.get("hash") != "md5":  # as DVC counted before its version 3
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
    """Return a dependency's path with the params that its template names."""
    path = dep if isinstance(dep, str) else next(iter(dep))
    return os.path.normpath(_TEMPLATE.sub(lambda match: str(_value(values, match[1])), path))


def _text(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
