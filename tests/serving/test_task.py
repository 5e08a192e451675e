"""Load the task of exports, including exports of other versions and invalid ones."""

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


def test_unknown_keys_of_other_versions_are_ignored(export):
    content = json.loads((export / "params.json").read_text())
    content["finetune"] = {"a_key_of_another_version": 1}
    content["another_section"] = {}
    content["data"]["a_key_of_another_version"] = 1
    (export / "params.json").write_text(json.dumps(content))
    assert TunedTask.load(export).labels == tuple(LABELS)


def test_the_longest_evaluated_completion_is_read(export):
    assert TunedTask.load(export).max_new_tokens == 64
    content = json.loads((export / "params.json").read_text())
    content["evaluate"]["max_new_tokens"] = 20
    (export / "params.json").write_text(json.dumps(content))
    assert TunedTask.load(export).max_new_tokens == 20
    del content["evaluate"]
    (export / "params.json").write_text(json.dumps(content))
    assert TunedTask.load(export).max_new_tokens == 64


def test_dataset_with_many_files_loads(export):
    content = json.loads((export / "dataset.json").read_text())
    content["files"] *= 20_000
    (export / "dataset.json").write_text(json.dumps(content))
    assert TunedTask.load(export).labels == tuple(LABELS)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("params.json", "{}", "data is required but missing"),
        ("params.json", "[]", "file = []: input should be keys and values"),
        ("params.json", '{"data": {"train": 3}}', "data.train = 3"),
        ("dataset.json", "{}", "contains no labels"),
        ("dataset.json", "[]", "file = []: input should be keys and values"),
        ("dataset.json", '{"labels": [1]}', "labels = [1]: input should be a valid string"),
    ],
)
def test_invalid_export_files_raise(export, name, content, reason):
    (export / name).write_text(content)
    with pytest.raises(UserError) as error:
        TunedTask.load(export)
    assert name in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value)
