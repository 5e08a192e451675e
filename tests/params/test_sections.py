"""params.yaml: every problem named, all of them at once."""

import pytest

from gptj8.params.sections import NO_PATH, load_params, parse_params, resolved
from gptj8.runtime.errors import UserError
from tests.helpers.paths import ROOT

MINIMAL = {"data": {"train": "rows.csv"}, "model": {"path": "model"}}


def problems(**sections):
    content = {key: {**MINIMAL.get(key, {}), **value} for key, value in sections.items()}
    with pytest.raises(UserError) as caught:
        parse_params({**MINIMAL, **content})
    return str(caught.value).splitlines()


def test_the_projects_own_params_are_valid_and_name_every_key():
    from ruamel.yaml import YAML

    params = load_params(ROOT / "params.yaml")
    written = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    assert {k: set(v) for k, v in written.items() if k != "seed"} == {
        k: set(v) for k, v in params.model_dump().items() if k != "seed"
    }


def test_defaults_fill_in_what_is_not_written():
    params = parse_params(MINIMAL)
    assert params.finetune.method == "lora"
    assert "tracking" not in resolved(params)
    assert resolved(params)["data"]["train"] == "rows.csv"


def test_no_path_is_null_to_the_code_and_a_file_to_dvc(tmp_path):
    params = load_params(ROOT / "params.yaml")
    assert (ROOT / NO_PATH).is_file()
    assert params.data.validation is params.data.test is params.evaluate.perplexity_text is None
    assert set(params.inputs) == {"data.train", "model.path"}
    assert resolved(params)["evaluate"]["predictions"] is None


def test_a_null_path_is_refused_by_name(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    nulls = text.replace(NO_PATH + "\n", "null\n")
    assert nulls.count("null") == text.count("null") + 4
    (tmp_path / "params.yaml").write_text(nulls)
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "params.yaml")
    lines = str(caught.value).splitlines()
    keys = ["data.validation", "data.test", "evaluate.perplexity_text", "evaluate.predictions"]
    assert [line.split(": ")[1].split()[0] for line in lines] == keys
    assert all("write data/none for none" in line for line in lines)
    (tmp_path / "None").write_text("as in commits before")
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


def test_all_problems_are_shown_at_once():
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
    with pytest.raises(UserError, match=r"model\.path is required and not given"):
        parse_params({"data": {"train": "x"}, "model": {}})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "must hold a field, such as {text}"),
        ("{text} {label}", "cannot hold {label}"),
        ("{text", "not a template"),
        ("{}", "a field is a column's name in braces"),
        ("{text!r}", "a field is a column's name in braces"),
        ("{prompt}", "must hold {text} and not {prompt}"),
        ("{messages}", "its task is completion"),
    ],
)
def test_a_template_without_its_field_is_refused(template, message):
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
def test_a_prompt_never_holds_its_answer(data):
    (line,) = problems(data=data)
    assert "is a column of prompt_template as well" in line


def test_labels_belong_to_a_classification():
    (line,) = problems(data={"task": "text", "labels": ["a", "b"]})
    assert "labels are for task=classification" in line


@pytest.mark.parametrize("target", ["attention", "all-linear", ["q_proj", "fc_in"]], ids=str)
def test_targets_are_groups_or_names(target):
    params = parse_params({**MINIMAL, "finetune": {"target": target}})
    assert params.finetune.target == (tuple(target) if isinstance(target, list) else target)


def test_a_wrong_target_is_one_problem():
    lines = problems(finetune={"target": "everything"})
    assert all(line.startswith("params.yaml: finetune.target = 'everything': ") for line in lines)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("data: {train: a}\nmodel: {path: b}\nfinetune: {learning_rate: 1e-4}\n")
    assert load_params(file).finetune.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: [", "not valid YAML"),
        ("- a\n- b\n", "holds no keys"),
        ("", "holds no keys"),
        ("seed: 1\nseed: 2\n", "not valid YAML"),
        ("data: !!python/object/apply:os.system ['true']\n", "tags are not read"),
    ],
    ids=["broken", "list", "empty", "duplicate-key", "python-tag"],
)
def test_files_that_are_no_params_are_refused(tmp_path, content, message):
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
def test_inputs_lie_in_the_project(tmp_path, key, path):
    from ruamel.yaml import YAML

    section, name = key.split(".")
    content = {**MINIMAL, section: {**MINIMAL.get(section, {}), name: path}}
    YAML().dump(content, tmp_path / "params.yaml")
    with pytest.raises(UserError, match=rf"{key} = '{path}' leads out of the project; put the da"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("path", ["--config=x", "-x", "a\0b"])
def test_an_option_is_no_path(tmp_path, path):
    from ruamel.yaml import YAML

    YAML().dump({**MINIMAL, "model": {"path": path}}, tmp_path / "params.yaml")
    with pytest.raises(UserError, match=r"model\.path = .* is no path"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: !!int 3\n", "line 1: tags are not read"),
        ("data: {}\nmodel:\n  <<: {path: x}\n", "line 3: merge keys are not read"),
    ],
)
def test_values_are_all_that_is_read(tmp_path, text, reason):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        load_params(tmp_path / "params.yaml")


def test_a_folder_is_no_params_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_params(tmp_path)
