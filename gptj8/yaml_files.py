"""YAML that users write: read as values only, within limits, and checked against a pydantic model,
every problem in one line."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, ScalarEvent

from gptj8.errors import UserError
from gptj8.words import one_line

_MOST_CHARACTERS, _MOST_VALUES, _MOST_LEVELS = 1_000_000, 10_000, 50

_Model = TypeVar("_Model", bound=BaseModel)


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
        raise UserError(f"{path} does not exist; run from the folder that holds it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # What a value is not, such as the 99th of a month, comes as whatever the constructor raised.
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)[:300]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys and values, such as `seed: 0`")
    return content


def read_checked(model: type[_Model], path: str | Path) -> _Model:
    """Read a file as a `model`; see `check`."""
    return check(model, read_yaml(path), str(path))


def check(model: type[_Model], content: dict[str, Any], source: str) -> _Model:
    """Return what was read as a `model`, which is frozen and strict and has tuples for lists.

    Args:
        source: what the problems are said of.

    Raises:
        UserError: listing every unknown key and wrong value, a line each.
    """
    try:
        return model.model_validate(_tuples_for_lists(content, _Nodes(source)))
    except RecursionError:
        raise UserError(f"{source} is nested too deeply") from None
    except ValidationError as error:
        problems = [f"{source}: {_explain(problem, content, model)}" for problem in error.errors()]
    raise UserError("\n".join(problems))


def _refuse_more_than_values(text: str, path: str | Path) -> None:
    """Refuse what a YAML file may do besides saying values: name types, multiply itself, and nest
    so deeply that reading it takes minutes."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise UserError(f"{path} is nested too deeply")
        if getattr(event, "ctag", None) is not None:
            raise UserError(f"{path} line {event.start_mark.line + 1}: tags are not read")
        if isinstance(event, ScalarEvent) and event.style is None and event.value == "<<":
            raise UserError(f"{path} line {event.start_mark.line + 1}: merge keys are not read")


class _Nodes:
    """Counts the values of a file: aliases of aliases make billions of a few lines."""

    def __init__(self, source: str) -> None:
        self._source, self._left = source, _MOST_VALUES

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"{self._source} has more than {_MOST_VALUES:,} values")


def _tuples_for_lists(value: Any, nodes: _Nodes) -> Any:
    """YAML has lists, frozen sections have tuples, and strict checking tells the two apart."""
    nodes.count()
    if isinstance(value, dict):
        return {key: _tuples_for_lists(item, nodes) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples_for_lists(item, nodes) for item in value)
    return value


def _explain(problem: Any, content: dict[str, Any], model: type[BaseModel]) -> str:
    # A union names its branches in the location; only what the user wrote is of use to them.
    location = [str(part) for part in problem["loc"]]
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
    try:
        value = repr(here)
    except ValueError:  # of more digits than Python writes
        value = "a number without end"
    return f"{name} = {value}: {message}"


def _known_keys(model: type[BaseModel], section: list[str]) -> list[str]:
    for part in section:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    return list(model.model_fields)
