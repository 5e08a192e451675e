"""Check that the input files exist, or that a recipe can make them, before a run starts."""

from __future__ import annotations

from pathlib import Path

from gptj8.params.sections import Params
from gptj8.runtime.project import project_root


def missing_inputs(params: Params, root: Path | None = None) -> list[str]:
    """Return one line per input that neither exists nor is made by a recipe under data/."""
    root = root or project_root()
    problems = []
    for key, value in params.inputs.items():
        if (root / value).exists():
            continue
        if is_made_by_a_recipe((root / value).absolute(), root):
            continue
        section, _, split = key.partition(".")
        if section == "data":
            from gptj8.dataset.readers.sources import explain_missing

            problems.append(explain_missing(split, value))
        else:
            problems.append(f"{key} = {value} does not exist, and no recipe under data/ makes it")
    return problems


def is_made_by_a_recipe(path: Path, root: Path) -> bool:
    """Return whether a dvc.yaml below `root` declares the path, or a parent of it, as an output."""
    from ruamel.yaml import YAML

    for folder in path.parents:
        if root not in folder.parents or not (folder / "dvc.yaml").is_file():
            continue
        content = YAML(typ="safe").load(folder / "dvc.yaml") or {}
        for stage in content.get("stages", {}).values():
            for out in stage.get("outs", []):
                made = folder / (out if isinstance(out, str) else next(iter(out)))
                if made == path or made in path.parents:
                    return True
    return False
