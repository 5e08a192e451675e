"""Files that users write, YAML above all: read as values only, within limits, and checked against a
pydantic model, every problem in one line."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
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

# What a value is not, such as the 99th of a month, comes as whatever the constructor raised.
_NO_VALUES = (
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
    """A mapping whose keys are all known and whose values are of their types, and finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping of keys to values.

    Raises:
        UserError: in one line; also of a file that does more than say values.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise UserError(f"{path} has more than {_MOST_CHARACTERS:,} characters")
        _refuse_more_than_values(text, path)
        content = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is this the project's folder?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _NO_VALUES as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys and values, such as `seed: 0`")
    return content


def read_checked(model: type[_Model], path: str | Path) -> _Model:
    """Read a file as a `model`; see `check`."""
    return check(model, read_yaml(path), str(path))


def check(model: type[_Model], content: dict[str, Any], source: str) -> _Model:
    """Return what was read as a `model`, in which lists are tuples.

    Args:
        source: what the problems are said of.

    Raises:
        UserError: listing unknown keys and wrong values, a line each, the first ten.
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


def _refuse_more_than_values(text: str, path: str | Path) -> None:
    """Refuse what a YAML file may do besides saying some values: name types, multiply itself by
    aliases, read itself by other rules, nest deeply, and go on for so long that reading takes
    minutes. Reads no further than to the first of these."""
    depth = values = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        values += isinstance(event, (CollectionStartEvent, ScalarEvent))
        if depth > _MOST_LEVELS:
            raise UserError(f"{path} is nested too deeply")
        if values > _MOST_VALUES:
            raise UserError(f"{path} has more than {_MOST_VALUES:,} values")
        if more := _more_than_a_value(event):
            raise UserError(f"{path} line {event.start_mark.line + 1}: {more}")


def _more_than_a_value(event: Any) -> str | None:
    if getattr(event, "ctag", None) is not None:
        return "tags are not read"
    if isinstance(event, AliasEvent):
        return "aliases are not read; write the value once more"
    if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
        return "directives are not read"
    if isinstance(event, ScalarEvent) and event.style is None and event.value == "<<":
        return "merge keys are not read"
    return None


def _tuples_for_lists(value: Any) -> Any:
    """YAML and JSON have lists, our models tuples, and strict checking tells the two apart."""
    if isinstance(value, dict):
        return {key: _tuples_for_lists(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples_for_lists(item) for item in value)
    return value


def _explain(problem: Any, content: dict[str, Any], model: type[BaseModel]) -> str:
    # A union names its branches in the location; only what the user wrote is of use to them.
    location = [excerpt(str(part), _LONGEST_VALUE) for part in problem["loc"]]
    depth = 0
    here: Any = content
    while depth < len(location) and isinstance(here, dict) and location[depth] in here:
        here = here[location[depth]]
        depth += 1
    kind = problem["type"]
    if kind == "missing":
        return f"{'.'.join(location)} is required and not given"
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
    shortened = Repr()
    shortened.maxstring = shortened.maxother = _LONGEST_VALUE
    try:
        return shortened.repr(value)
    except ValueError:  # of more digits than Python writes
        return "a number without end"


def _known_keys(model: type[BaseModel], section: list[str]) -> list[str]:
    for part in section:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)
