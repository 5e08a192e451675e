"""Defaults have one home, and the documentation and the schema are generated from it."""

from __future__ import annotations

import json

import jsonschema
import pytest
from ruamel.yaml import YAML

from gptj8.params.documentation import PAGE, SCHEMA_FILE, json_schema, markdown
from gptj8.params.sections import (
    NO_PATH,
    OPTIONAL_PATHS,
    Params,
    Quantization,
    load_params,
    parse_params,
)
from gptj8.quantization.quantizer import Blockwise8bitConfig
from gptj8.runtime.errors import UserError
from tests.helpers.paths import ROOT

WRITTEN = YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def test_the_page_and_the_schema_are_up_to_date():
    assert (ROOT / PAGE).read_text() == markdown(), "run make docs"
    assert json.loads((ROOT / SCHEMA_FILE).read_text()) == json_schema(), "run make docs"


def test_every_key_is_documented():
    page = markdown()
    for section, field in Params.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        for key in keys or ():
            assert f"| `{section}.{key}` |" in page
    for section in json_schema()["$defs"].values():
        assert all(field["description"] for field in section["properties"].values())


def test_deleting_a_key_changes_nothing():
    """The defaults of the code are the values of params.yaml."""
    complete = load_params(ROOT / "params.yaml")
    for section, content in WRITTEN.items():
        for key in content if isinstance(content, dict) else ():
            if (section, key) in (("data", "train"), ("model", "path")):
                continue
            shorter = {k: v for k, v in content.items() if k != key}
            assert parse_params({**WRITTEN, section: shorter}) == complete, f"{section}.{key}"
    assert parse_params({k: v for k, v in WRITTEN.items() if k != "seed"}) == complete


def test_the_quantizer_has_the_defaults_of_the_params():
    found = Blockwise8bitConfig().to_dict()
    assert found == Blockwise8bitConfig.from_params(Quantization()).to_dict()


def test_editors_find_the_schema_and_it_describes_the_file():
    first = (ROOT / "params.yaml").read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    schema = json_schema()
    assert set(WRITTEN) == set(schema["properties"])
    for section, content in WRITTEN.items():
        if not isinstance(content, dict):
            continue
        described = schema["$defs"][section.capitalize()]
        assert set(content) == set(described["properties"])
        assert described["additionalProperties"] is False


def test_the_schema_accepts_the_file_and_rejects_what_params_reject():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(WRITTEN)
    for section, key, value in (
        ("finetune", "lerning_rate", 1e-4),
        ("finetune", "r", 0),
        ("finetune", "lora_dropout", 1.0),
        ("quantization", "block_size", 100),
        ("data", "task", "classify"),
        ("data", "test_fraction", "a tenth"),
    ):
        wrong = {**WRITTEN, section: {**WRITTEN[section], key: value}}
        (error,) = validator.iter_errors(wrong)
        assert error.absolute_path[0] == section
        with pytest.raises(UserError, match=key):
            parse_params(wrong)


@pytest.mark.parametrize(("section", "key"), OPTIONAL_PATHS)
def test_an_unset_path_is_a_placeholder_in_the_file(section, key):
    assert WRITTEN[section][key] == NO_PATH
    field = json_schema()["$defs"][section.capitalize()]["properties"][key]
    assert (field["type"], field["default"]) == ("string", NO_PATH)
