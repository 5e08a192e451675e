"""params.yaml with overrides from the command line, in the syntax of `dvc exp run -S`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptj8.params.sections import PARAMS_FILE, Params, check_params, load_params, parse_params
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line


def overridden_params(overrides: Sequence[str]) -> Params:
    """Return params.yaml with overrides applied as `dvc exp run -S` does. Writes no file.

    Raises:
        UserError: if an override has invalid syntax, or sets an unknown key or an invalid value.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides
    from ruamel.yaml import YAML

    for change in overrides:
        if "=" not in change:
            raise UserError(f"-S {change}: write key=value, such as finetune.r=4")
    load_params()  # report errors of params.yaml itself first
    own = to_path_overrides(overrides).get(PARAMS_FILE, [])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PARAMS_FILE
        copy.write_bytes(Path(PARAMS_FILE).read_bytes())
        try:
            if own:
                apply_overrides(copy, own)
        except DvcException as error:
            _raise_for_unknown_keys(own)
            raise UserError(f"-S {' '.join(own)}: {one_line(error)}") from None
        content = YAML(typ="safe", pure=True).load(copy.read_text(encoding="utf-8"))
    source = " ".join([PARAMS_FILE, *(f"-S {change}" for change in own)])
    return check_params(content, PARAMS_FILE, source)


def _raise_for_unknown_keys(changes: Sequence[str]) -> None:
    """Raise an error that names the first unknown key. DVC's own message does not suggest one."""
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
