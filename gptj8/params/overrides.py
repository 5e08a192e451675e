"""params.yaml with changes from the command line, as `dvc exp run -S` makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptj8.params.sections import PARAMS_FILE, Params, load_params, null_paths, parse_params
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line


def overridden_params(overrides: Sequence[str]) -> Params:
    """Return params.yaml with changes as `dvc exp run -S` makes them; nothing is written.

    Raises:
        UserError: if a change cannot be read, or makes a key or value that params.yaml cannot have.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides
    from ruamel.yaml import YAML

    for change in overrides:
        if "=" not in change:
            raise UserError(f"-S {change}: a change is written key=value, as in finetune.r=4")
    load_params()  # its own mistakes are told first
    own = to_path_overrides(overrides).get(PARAMS_FILE, [])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PARAMS_FILE
        copy.write_bytes(Path(PARAMS_FILE).read_bytes())
        try:
            if own:
                apply_overrides(copy, own)
        except DvcException as error:
            _refuse_unknown_keys(own)
            raise UserError(f"-S {' '.join(own)}: {one_line(error)}") from None
        content = YAML(typ="safe", pure=True).load(copy.read_text(encoding="utf-8"))
    source = " ".join([PARAMS_FILE, *(f"-S {change}" for change in own)])
    params = parse_params(content, source)
    if problems := null_paths(content):
        raise UserError("\n".join(problems))
    return params


def _refuse_unknown_keys(changes: Sequence[str]) -> None:
    """Tell of a key that params.yaml cannot have, which DVC only calls invalid."""
    for change in changes:
        *sections, key = change.partition("=")[0].split(".")
        content: dict[str, Any] = {key: None}
        for section in reversed(sections):
            content = {section: content}
        try:
            parse_params(content, f"-S {change}")
        except UserError as error:
            unknown = [line for line in str(error).splitlines() if "is not a known key" in line]
            if unknown:
                raise UserError(unknown[0]) from None
