"""Tests of the check for missing inputs before a run."""

import pytest

from gptj8.dataset.inputs import check_inputs, missing_inputs
from gptj8.params.sections import parse_params
from gptj8.runtime.errors import UserError


def test_outputs_of_a_recipe_are_not_missing(tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    recipe = "stages: {make: {cmd: 'true', outs: [rows.csv, {model: {cache: true}}]}}"
    (tmp_path / "data" / "x" / "dvc.yaml").write_text(recipe)
    (tmp_path / "model").mkdir()
    params = parse_params({"data": {"train": "data/x/rows.csv"}, "model": {"path": "model"}})
    assert missing_inputs(params, tmp_path) == []
    params = parse_params({"data": {"train": "data/x/typo.csv"}, "model": {"path": "data/x/model"}})
    (line,) = missing_inputs(params, tmp_path)
    assert line.startswith("data.train: data/x/typo.csv does not exist")
    params = parse_params({"data": {"train": "rows.csv"}, "model": {"path": "model"}})
    (line,) = missing_inputs(params, tmp_path)
    assert line.startswith("data.train: rows.csv does not exist")
    params = parse_params({"data": {"train": "rows/*.csv"}, "model": {"path": "model"}})
    (line,) = missing_inputs(params, tmp_path)
    assert "set data.train: rows and data.train_files: *.csv" in line


def test_the_models_context_is_checked_before_a_run(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"n_positions": 64}')
    content = {"data": {"train": "rows.csv", "max_length": 64}, "model": {"path": "model"}}
    check_inputs(parse_params(content), tmp_path)
    content["data"]["max_length"] = 65
    with pytest.raises(UserError, match=r"data.max_length = 65 exceeds the 64 positions"):
        check_inputs(parse_params(content), tmp_path)
    content["model"]["path"] = "rows.csv"
    with pytest.raises(UserError, match=r"model.path = .*rows.csv is not a model directory"):
        check_inputs(parse_params(content), tmp_path)
