"""What an export says of its task, also an export of another version, and one that says nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from gptj8.runtime.errors import UserError
from gptj8.serving.task import TunedTask
from tests.helpers.served_models import LABELS


@pytest.fixture
def export(exports, tmp_path):
    return shutil.copytree(exports["classification"], tmp_path / "export")


def test_sections_that_are_of_no_use_to_it_may_be_of_another_version(export):
    content = json.loads((export / "params.json").read_text())
    content["finetune"] = {"a_key_of_another_version": 1}
    content["another_section"] = {}
    content["data"]["a_key_of_another_version"] = 1
    (export / "params.json").write_text(json.dumps(content))
    assert TunedTask.load(export).labels == tuple(LABELS)


def test_a_dataset_of_many_files_is_served(export):
    content = json.loads((export / "dataset.json").read_text())
    content["files"] *= 20_000
    (export / "dataset.json").write_text(json.dumps(content))
    assert TunedTask.load(export).labels == tuple(LABELS)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("params.json", "{}", "data is required and not given"),
        ("params.json", "[]", "file = []: input should be keys and values"),
        ("params.json", '{"data": {"train": 3}}', "data.train = 3"),
        ("dataset.json", "{}", "names no labels"),
        ("dataset.json", "[]", "file = []: input should be keys and values"),
        ("dataset.json", '{"labels": [1]}', "labels = [1]: input should be a valid string"),
    ],
)
def test_what_says_nothing_is_named(export, name, content, said):
    (export / name).write_text(content)
    with pytest.raises(UserError) as error:
        TunedTask.load(export)
    assert name in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)
