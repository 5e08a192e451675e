"""Check that the input files exist, or that a recipe can make them, before a run starts."""

from __future__ import annotations

from pathlib import Path

from gptj8.params.sections import Params
from gptj8.runtime.errors import UserError
from gptj8.runtime.project import project_root


def check_inputs(params: Params, root: Path | None = None) -> None:
    """Check everything about the inputs that is known before a run, without reading the data.

    Raises:
        UserError: with one line per problem.
    """
    root = root or project_root()
    problems = missing_inputs(params, root)
    model = root / params.model.path
    if model.exists():
        try:
            check_model(model, params.data.max_length)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def check_model(path: str | Path, max_length: int) -> None:
    """Check that a path is a model directory whose context has room for `max_length` tokens.

    Raises:
        UserError: if it is not.
    """
    from gptj8.dataset.prepared.prompts import check_context

    if not Path(path).is_dir():
        raise UserError(f"model.path = {path} is not a model directory")
    check_context(path, max_length)


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
