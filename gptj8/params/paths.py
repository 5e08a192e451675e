"""Paths in params.yaml that may be unset."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

NO_PATH = "data/none"
"""The value in params.yaml for "no path". DVC resolves every path that dvc.yaml names, so an unset
path has to be an existing file too."""

OptionalPath = Annotated[
    str | None, BeforeValidator(lambda path: None if path == NO_PATH else path)
]
