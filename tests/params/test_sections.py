"""params.yaml is validated, and all its problems are reported together."""

import pytest

from gptj8.params.paths import NO_PATH
from gptj8.params.sections import check_params, load_params, parse_params, resolved
from gptj8.runtime.errors import UserError
from tests.helpers.paths import ROOT

MINIMAL = {"data": {"train": "rows.csv"}, "model": {"path": "model"}}


def problems(**sections):
    content = {key: {**MINIMAL.get(key, {}), **value} for key, value in sections.items()}
    with pytest.raises(UserError) as caught:
        parse_params({**MINIMAL, **content})
    return str(caught.value).splitlines()


def test_the_projects_own_params_are_valid_and_complete():
    from ruamel.yaml import YAML

    params = load_params(ROOT / "params.yaml")
    written = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    assert {k: set(v) for k, v in written.items() if k != "seed"} == {
        k: set(v) for k, v in params.model_dump().items() if k != "seed"
    }


def test_missing_keys_get_defaults():
    params = parse_params(MINIMAL)
    assert params.finetune.method == "lora"
    assert "tracking" not in resolved(params)
    assert resolved(params)["data"]["train"] == "rows.csv"


def test_an_unset_path_is_none_in_params_and_a_file_for_dvc(tmp_path):
    params = load_params(ROOT / "params.yaml")
    assert (ROOT / NO_PATH).is_file()
    assert params.data.validation is params.data.test is params.evaluate.perplexity_text is None
    assert set(params.inputs) == {"data.train", "model.path"}
    assert resolved(params)["evaluate"]["predictions"] is None


def test_null_paths_raise_an_error_that_names_them(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    nulls = text.replace(NO_PATH + "\n", "null\n")
    assert nulls.count("null") == text.count("null") + 5
    (tmp_path / "params.yaml").write_text(nulls)
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "params.yaml")
    lines = str(caught.value).splitlines()
    keys = ["data.validation", "data.test", "quantization.calibration"]
    keys += ["evaluate.perplexity_text", "evaluate.predictions"]
    assert [line.split(": ")[1].split()[0] for line in lines] == keys
    assert all("use data/none for no path" in line for line in lines)
    (tmp_path / "None").write_text("as in earlier commits")
    assert load_params(tmp_path / "params.yaml").data.test is None


def test_sections_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        parse_params(MINIMAL).finetune.r = 3


def test_an_unknown_key_gets_a_suggestion():
    assert problems(finetune={"lerning_rate": 1e-3}) == [
        "params.yaml: finetune.lerning_rate is not a known key; did you mean learning_rate?"
    ]


def test_an_unknown_section_gets_a_suggestion():
    with pytest.raises(UserError, match="fintune is not a known key; did you mean finetune"):
        parse_params({**MINIMAL, "fintune": {"r": 4}})


def test_all_problems_are_reported_together():
    lines = problems(
        data={"task": "regression", "max_length": "long"},
        quantization={"block_size": 3},
        finetune={"r": 0, "learning_rate": -1.0, "lora_dropout": 1.5},
    )
    assert len(lines) == 6
    for key in (
        "data.task = 'regression'",
        "data.max_length = 'long'",
        "quantization.block_size = 3",
        "finetune.r = 0",
        "finetune.learning_rate = -1.0",
        "finetune.lora_dropout = 1.5",
    ):
        assert sum(line.startswith(f"params.yaml: {key}: ") for line in lines) == 1, lines


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"model\.path is required but missing"):
        parse_params({"data": {"train": "x"}, "model": {}})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "must contain a field, such as {text}"),
        ("{text} {label}", "cannot contain {label}"),
        ("{text", "not a valid template"),
        ("{}", "a field is a column's name in braces"),
        ("{text!r}", "a field is a column's name in braces"),
        ("{prompt}", "must contain {text} and not {prompt}"),
        ("{messages}", "needs task=completion"),
    ],
)
def test_an_invalid_template_raises(template, message):
    (line,) = problems(data={"prompt_template": template})
    assert line.startswith("params.yaml: data: ")
    assert message in line


@pytest.mark.parametrize(
    "data",
    [
        {"label_column": "text"},
        {"prompt_template": "{text} {topic}", "label_column": "topic"},
        {"task": "completion", "prompt_template": "{prompt}", "completion_column": "prompt"},
    ],
)
def test_a_template_with_the_answer_column_raises(data):
    (line,) = problems(data=data)
    assert "is also a column of prompt_template" in line


def test_labels_require_a_classification_task():
    (line,) = problems(data={"task": "text", "labels": ["a", "b"]})
    assert "labels apply to task=classification" in line


@pytest.mark.parametrize("target", ["attention", "all-linear", ["q_proj", "fc_in"]], ids=str)
def test_targets_are_groups_or_module_names(target):
    params = parse_params({**MINIMAL, "finetune": {"target": target}})
    assert params.finetune.target == (tuple(target) if isinstance(target, list) else target)


def test_a_wrong_target_is_one_problem():
    lines = problems(finetune={"target": "everything"})
    assert all(line.startswith("params.yaml: finetune.target = 'everything': ") for line in lines)


@pytest.mark.parametrize(
    ("finetune", "parts"),
    [
        (
            {"early_stopping_patience": 2, "load_best": False},
            ("early_stopping_patience = 2", "load_best"),
        ),
        (
            {"loraplus_lr_ratio": 16.0, "method": "layernorm"},
            ("loraplus_lr_ratio = 16", "method is layernorm"),
        ),
        ({"init_lora_weights": "orthogonal", "r": 5}, ("init_lora_weights = orthogonal", "r = 5")),
        (
            {"packing": True, "neftune_noise_alpha": 5.0},
            ("neftune_noise_alpha", "packing = true"),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_exclude_each_other_are_one_problem(finetune, parts):
    (line,) = problems(finetune=finetune)
    assert line.startswith("params.yaml: finetune: ")
    assert all(part in line for part in parts), line
    for key in finetune:  # each alone is valid
        parse_params({**MINIMAL, "finetune": {key: finetune[key]}})


@pytest.mark.parametrize(
    "finetune",
    [
        {"early_stopping_patience": 0},
        {"loraplus_lr_ratio": 0.5},
        {"neftune_noise_alpha": 0.0},
        {"init_lora_weights": "pissa"},
        {"metric_for_best_model": "accuracy"},
    ],
    ids=str,
)
def test_values_out_of_bounds_are_named(finetune):
    ((key, value),) = finetune.items()
    lines = problems(finetune=finetune)
    assert all(line.startswith(f"params.yaml: finetune.{key} = {value!r}: ") for line in lines)


def test_accuracy_as_the_metric_needs_labels():
    metric = {"metric_for_best_model": "eval_accuracy"}
    parse_params({**MINIMAL, "finetune": metric})
    text = {"task": "text"}
    (line,) = problems(finetune=metric, data=text)
    assert "finetune.metric_for_best_model = eval_accuracy" in line
    assert "the task is text" in line
    parse_params({**MINIMAL, "data": {**MINIMAL["data"], **text}})


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("data: {train: a}\nmodel: {path: b}\nfinetune: {learning_rate: 1e-4}\n")
    assert load_params(file).finetune.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: [", "not valid YAML"),
        ("- a\n- b\n", "must contain keys"),
        ("", "must contain keys"),
        ("seed: 1\nseed: 2\n", "not valid YAML"),
        ("data: !!python/object/apply:os.system ['true']\n", "YAML tags are not supported"),
    ],
    ids=["broken", "list", "empty", "duplicate-key", "python-tag"],
)
def test_files_that_are_not_params_raise(tmp_path, content, message):
    file = tmp_path / "params.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_params(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"params\.yaml does not exist"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("key", ["data.train", "data.test", "model.path", "evaluate.predictions"])
@pytest.mark.parametrize("path", ["/etc/passwd", "../secrets.csv", "data/../../x.csv"])
def test_paths_outside_the_project_raise(tmp_path, key, path):
    from ruamel.yaml import YAML

    section, name = key.split(".")
    content = {**MINIMAL, section: {**MINIMAL.get(section, {}), name: path}}
    YAML().dump(content, tmp_path / "params.yaml")
    with pytest.raises(
        UserError, match=rf"{key} = '{path}' is outside the project; put it, or a l"
    ):
        load_params(tmp_path / "params.yaml")


def test_an_absolute_path_in_the_project_is_shown_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"data": {"train": str(tmp_path / "rows" / "x.csv")}, "model": {"path": "m"}}
    with pytest.raises(UserError, match=r"is not relative .*; use 'rows/x\.csv'"):
        check_params(content)


@pytest.mark.parametrize("path", ["--config=x", "-x", "a\0b"])
def test_options_and_nul_bytes_are_not_paths(tmp_path, path):
    from ruamel.yaml import YAML

    YAML().dump({**MINIMAL, "model": {"path": path}}, tmp_path / "params.yaml")
    with pytest.raises(UserError, match=r"model\.path = .* is not a path"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: !!int 3\n", "line 1: YAML tags are not supported"),
        ("data: {}\nmodel:\n  <<: {path: x}\n", "line 3: YAML merge keys are not supported"),
    ],
)
def test_yaml_tags_and_merge_keys_raise(tmp_path, text, reason):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        load_params(tmp_path / "params.yaml")


def test_a_folder_as_params_file_raises(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_params(tmp_path)
