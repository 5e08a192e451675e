"""Tests of the check for missing inputs before a run."""

from gptj8.dataset.inputs import missing_inputs
from gptj8.params.sections import parse_params


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
