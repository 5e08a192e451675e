"""Generate docs/params.md and params.schema.json from the typed params.

Editors with a YAML language server read the schema to complete and check params.yaml.

python -m gptj8.params.documentation     (writes both files; `make docs`)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptj8.params.paths import NO_PATH
from gptj8.params.sections import OPTIONAL_PATHS, Params

SCHEMA_FILE = Path("params.schema.json")
PAGE = Path("docs/params.md")

_HEAD = """# Parameters

`params.yaml` holds everything that a run depends on. Edit it, or override values for one
experiment: `dvc exp run -S finetune.r=4`. Unknown keys and wrong values are reported by name before
anything runs.

The defaults below are those of the code and of the `params.yaml` in the repository. This page and
`params.schema.json`, with which editors complete and check the file, are generated from
`gptj8/params/sections.py` by `make docs`.
"""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of params.yaml."""
    schema = Params.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section, key in OPTIONAL_PATHS:
        field = _section(schema, section)["properties"][key]
        # null is what the code sees; the file has a placeholder.
        field.pop("anyOf")
        field |= {"type": "string", "default": NO_PATH}
    for section in (schema, *schema["$defs"].values()):
        for field in section["properties"].values():
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
    return schema


def markdown() -> str:
    """Return the page: a table per section with key, type, default and meaning."""
    schema = json_schema()
    parts = [_HEAD]
    for name, field in schema["properties"].items():
        if "$ref" not in json.dumps(field):
            parts.append(_table({name: field}, ""))
            continue
        section = _section(schema, name)
        required = section.get("required", ())
        parts.append(f"## {name}\n\n{section['description']}\n")
        parts.append(_table(section["properties"], f"{name}.", required))
    return "\n".join(parts)


def _section(schema: dict[str, Any], name: str) -> dict[str, Any]:
    field = schema["properties"][name]
    reference = field.get("$ref") or field["allOf"][0]["$ref"]
    return schema["$defs"][reference.rpartition("/")[2]]


def _table(fields: dict[str, Any], prefix: str, required: Any = ()) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        default = "required" if key in required else f"`{_plain(field.get('default'))}`"
        row = (f"`{prefix}{key}`", _type(field), default, field["description"])
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return value.replace("\n", "\\n") if isinstance(value, str) else json.dumps(value)


def _type(field: dict[str, Any]) -> str:
    """Return a field's type and bounds in words."""
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{_plain(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{_plain(field['const'])}`"
    if field["type"] == "array":
        return "list"
    name = {"string": "text", "number": "number", "integer": "integer", "boolean": "true or false"}
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in field
    ]
    return " ".join([name.get(field["type"], field["type"]), ", ".join(bounds)]).strip()


def main() -> None:
    """Write both files into the repository in the working folder."""
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    SCHEMA_FILE.write_text(schema + "\n", encoding="utf-8")
    PAGE.write_text(markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
