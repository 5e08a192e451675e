"""Read YAML files within limits and check them against a pydantic model.

Only plain values are read. Every problem is reported in one line.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    ScalarEvent,
)

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import excerpt, one_line

_MOST_CHARACTERS, _MOST_VALUES, _MOST_LEVELS = 1_000_000, 10_000, 50
_MOST_PROBLEMS, _LONGEST_VALUE = 10, 200

# An invalid value, such as day 99 of a month, raises whatever its constructor raises.
_YAML_ERRORS = (
    YAMLError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)

_Model = TypeVar("_Model", bound=BaseModel)


class Section(BaseModel):
    """Base class of models that reject unknown keys, wrong types, NaN and infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,  # the descriptions in docs/params.md
    )


class TextSection(Section):
    """A section whose values are texts or null, such as names and revisions on the Hub."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: object) -> object:
        # YAML reads a commit that has only digits as a number.
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError("not a string; put it in quotes, or set null")
        return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Raises:
        UserError: in one line, if the file is missing, invalid, too large, or uses tags, aliases,
            directives or merge keys.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise UserError(f"{path} has more than {_MOST_CHARACTERS:,} characters")
        _raise_unless_plain(text, path)
        content = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run this in the project's folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _YAML_ERRORS as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain keys and values, such as `seed: 0`")
    return content


def read_checked(model: type[_Model], path: str | Path) -> _Model:
    """Read a YAML file and validate it; see `check`."""
    return check(model, read_yaml(path), str(path))


def check(model: type[_Model], content: dict[str, Any], source: str) -> _Model:
    """Validate `content` and return it as a `model`, with lists converted to tuples.

    Args:
        model: the pydantic model.
        content: the parsed file.
        source: the name that problems begin with, such as the file's path.

    Raises:
        UserError: with one line per unknown key or wrong value, at most ten.
    """
    try:
        return model.model_validate(_tuples_for_lists(content))
    except RecursionError:
        raise UserError(f"{source} is nested too deeply") from None
    except ValidationError as error:
        found = error.errors(include_url=False)
    problems = [f"{source}: {_explain(each, content, model)}" for each in found[:_MOST_PROBLEMS]]
    if len(found) > _MOST_PROBLEMS:
        problems.append(f"{source}: and {len(found) - _MOST_PROBLEMS:,} more")
    raise UserError("\n".join(problems))


def _raise_unless_plain(text: str, path: str | Path) -> None:
    """Raise an error if YAML text is not plain values.

    Rejects tags, aliases (which can expand exponentially), directives, merge keys, deep nesting and
    so many values that parsing takes minutes. Stops reading at the first of these.
    """
    depth = values = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        values += isinstance(event, (CollectionStartEvent, ScalarEvent))
        if depth > _MOST_LEVELS:
            raise UserError(f"{path} is nested too deeply")
        if values > _MOST_VALUES:
            raise UserError(f"{path} has more than {_MOST_VALUES:,} values")
        if problem := _unsupported(event):
            raise UserError(f"{path} line {event.start_mark.line + 1}: {problem}")


def _unsupported(event: Any) -> str | None:
    if getattr(event, "ctag", None) is not None:
        return "YAML tags are not supported"
    if isinstance(event, AliasEvent):
        return "YAML aliases are not supported; repeat the value"
    if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
        return "YAML directives are not supported"
    if isinstance(event, ScalarEvent) and event.style is None and event.value == "<<":
        return "YAML merge keys are not supported"
    return None


def _tuples_for_lists(value: Any) -> Any:
    """Convert lists to tuples: the models have tuples, and strict validation rejects lists."""
    if isinstance(value, dict):
        return {key: _tuples_for_lists(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples_for_lists(item) for item in value)
    return value


def _explain(problem: Any, content: dict[str, Any], model: type[BaseModel]) -> str:
    # For a union, the location ends with the names of its branches. Keep only the user's keys.
    location = [excerpt(str(part), _LONGEST_VALUE) for part in problem["loc"]]
    depth = 0
    here: Any = content
    while depth < len(location) and isinstance(here, dict) and location[depth] in here:
        here = here[location[depth]]
        depth += 1
    kind = problem["type"]
    if kind == "missing":
        return f"{'.'.join(location)} is required but missing"
    name = ".".join(location[:depth]) or "file"
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{name} is not a known key; {hint}"
    message = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{name}: {message}"
    if kind == "model_type":
        message = "input should be keys and values"
    if isinstance(here, float) and not math.isfinite(here):
        message = "input should be a finite number"
    return f"{name} = {_shown(here)}: {message[:_LONGEST_VALUE]}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    shortened = Repr()
    shortened.maxstring = shortened.maxother = _LONGEST_VALUE
    try:
        return shortened.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return "a number with too many digits"


def _known_keys(model: type[BaseModel], section: list[str]) -> list[str]:
    for part in section:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)
