"""Test that exports are complete, equal the trained model and can be merged without loss."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import gptj8
from gptj8.export import reference_answers
from gptj8.export.bundle import (
    MERGED,
    adapter_bytes,
    collect,
    describe,
    describe_dataset,
    require_same_answers,
)
from gptj8.export.merging import merge
from gptj8.export.model_card import model_card
from gptj8.export.reference_answers import (
    REFERENCE_FILE,
    choose_prompts,
    compare_in_fresh_process,
    save_reference,
)
from gptj8.model.adapters import AdapterSpec, add_adapter, save_adapter
from gptj8.model.loading import load_adapter, load_model
from gptj8.params.sections import parse_params, resolved
from gptj8.runtime.errors import UserError

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
PARAMS = resolved(parse_params({"data": {"train": "rows.csv"}, "model": {"path": "models/tiny"}}))
METRICS = {
    "evaluate": {
        "tuned/accuracy": 0.875,
        "tuned/accuracy_low": 0.8,
        "tuned/accuracy_high": 0.925,
        "base/accuracy": 0.25,
        "gpt4/accuracy": 0.5,
    },
    "export": {
        "max_logit_difference": 0.125,
        "compared_prompts": 100,
        "identical_generations": 99,
        "merged_identical_generations": 98,
        "merged_perplexity_ratio": 1.0002,
        "merged_perplexity_ratio_low": 1.0,
        "merged_perplexity_ratio_high": 1.0003,
    },
    "convert": {"seconds": 1},
}
DATASET = {
    "labels": ["a", "b"],
    "rows": {"train": 10, "validation": 2, "test": 1234},
    "files": [{"path": "rows.csv", "md5": "0123456789abcdef"}],
    "prepared": "fedcba.dir",
}


ORIGINAL = Path("models/tiny")


@pytest.fixture(scope="module")
def adapter(tiny_8bit_dir, tmp_path_factory):
    """An adapter as stage finetune writes it: nonzero, with reference answers."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    save_reference(folder, model, PROMPTS, [0])
    return folder


@pytest.fixture
def exported(adapter, tiny_model_dir, tiny_8bit_dir, tmp_path):
    collect(adapter, tiny_8bit_dir, tmp_path, tiny_model_dir)
    describe(tmp_path, PARAMS, METRICS, DATASET)
    return tmp_path


def test_export_contains_the_expected_files(exported, adapter):
    names = {file.name for file in exported.iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "dataset.json",
        "manifest.json",
        "metrics.json",
        "params.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((exported / "params.json").read_text())["finetune"]["r"] == 8
    assert adapter_bytes(exported) == sum(f.stat().st_size for f in exported.iterdir())


def compare(adapter, model, exported=None, dtype=torch.float32):
    return compare_in_fresh_process(adapter, model, exported, dtype, CPU)


def test_export_equals_the_trained_model(exported, adapter, tiny_8bit_dir):
    compared = compare(adapter, tiny_8bit_dir, exported)
    assert compared == {
        "max_logit_difference": 0.0,
        "compared_prompts": 2,
        "identical_generations": 2,
    }
    require_same_answers(compared, "the export")


PLAIN_PEFT = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
assert "gptj8" not in sys.modules
with torch.no_grad():
    print(json.dumps([model(torch.tensor([ids])).logits[0].tolist() for ids in prompts]))
"""


def test_plain_peft_loads_the_export_on_the_original_model(exported, adapter, tiny_8bit_dir):
    command = [sys.executable, "-c", PLAIN_PEFT, str(exported), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model = load_adapter(load_model(tiny_8bit_dir, torch.float32, CPU), adapter)
    base = load_model(tiny_8bit_dir, torch.float32, CPU)
    for ids, found in zip(PROMPTS, json.loads(done.stdout), strict=True):
        with torch.no_grad():
            tuned, plain = (m(torch.tensor([list(ids)])).logits[0] for m in (model, base))
        found = torch.tensor(found)
        # The 8-bit weights differ slightly from the original's; the adapter changes much more.
        width = min(found.shape[1], tuned.shape[1])
        error = (found - tuned)[:, :width].norm()
        assert error < 0.1 * (tuned - plain)[:, :width].norm()


def test_export_names_the_original_model(adapter, tiny_8bit_dir, tmp_path):
    model = tmp_path / "gpt-j-6b" / "model"
    model.mkdir(parents=True)
    for folder, expected in ((model, (str(model), None)), (model, ("owner/gpt-j", "0123abcd"))):
        (tmp_path / expected[0][-4:]).mkdir()
        collect(adapter, tiny_8bit_dir, tmp_path / expected[0][-4:], folder)
        config = json.loads((tmp_path / expected[0][-4:] / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == expected
        card = model_card({**PARAMS, "model": {"path": str(folder)}}, METRICS, DATASET)
        assert f"base_model: {expected[0]}" in card
        # Now as a recipe that downloaded it would write it.
        (model / "source.json").write_text('{"repo": "owner/gpt-j", "revision": "0123abcd"}')


def test_different_adapter_raises(exported, adapter, tiny_8bit_dir):
    from safetensors.torch import load_file, save_file

    file = exported / "adapter_model.safetensors"
    state = load_file(file)
    changed = {n: -w if "lora_B" in n else w for n, w in state.items()}
    save_file(changed, file, metadata={"format": "pt"})
    compared = compare(adapter, tiny_8bit_dir, exported)
    assert compared["max_logit_difference"] > 0.01
    with pytest.raises(UserError, match=r"the export answers only \d of 2 prompts"):
        require_same_answers(compared, "the export")


def test_load_failure_in_a_new_process_raises_a_one_line_error(exported, adapter, tiny_8bit_dir):
    (exported / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot load \S+ in a new process") as caught:
        compare(adapter, tiny_8bit_dir, exported)
    assert "\n" not in str(caught.value)


def test_nan_logits_raise(exported, adapter, tiny_8bit_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / REFERENCE_FILE)
    tensors["logits"][0, 0] = float("nan")
    save_file(tensors, tmp_path / REFERENCE_FILE)
    with pytest.raises(UserError, match="logits are not finite"):
        compare(tmp_path, tiny_8bit_dir, exported)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_layernorms_give_the_same_answers_after_loading(tiny_8bit_dir, tmp_path, dtype):
    model = load_model(tiny_8bit_dir, dtype, CPU)
    adapted = add_adapter(model, AdapterSpec("layernorm"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_adapter(adapted, tmp_path, dtype)
    save_reference(tmp_path, adapted, PROMPTS, [0])
    compared = compare(tmp_path, tiny_8bit_dir, tmp_path, dtype)
    assert compared["max_logit_difference"] == 0.0
    assert compared["identical_generations"] == 2


def test_missing_reference_answers_raise(exported, tiny_8bit_dir, tmp_path):
    with pytest.raises(UserError, match=f"{REFERENCE_FILE} does not exist; rerun finetune"):
        compare(tmp_path, tiny_8bit_dir, exported)


def test_choose_prompts_takes_the_first_up_to_the_limits():
    assert choose_prompts([[1]] * 300) == [[1]] * 100
    assert [len(p) for p in choose_prompts([[1] * 10_000, [1] * 6_000, [1] * 6_000])] == [
        10_000,
        6_000,
    ]
    assert len(choose_prompts([[1] * 100_000, [1]])) == 1


def test_incomplete_adapter_raises(tiny_8bit_dir, tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json; rerun finetune"):
        collect(tmp_path / "adapter", tiny_8bit_dir, tmp_path, ORIGINAL)


def test_adapter_changed_after_training_raises(adapter, tiny_8bit_dir, tmp_path):
    """The check compares bytes, because a small change leaves most answers the same."""
    from safetensors.torch import load_file, save_file

    changed = tmp_path / "adapter"
    shutil.copytree(adapter, changed)
    state = load_file(changed / "adapter_model.safetensors")
    name = next(name for name in state if "lora_B" in name)
    state[name][0, 0] += 1e-6
    save_file(state, changed / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was changed after training"):
        collect(changed, tiny_8bit_dir, tmp_path, ORIGINAL)
    (changed / REFERENCE_FILE).unlink()
    with pytest.raises(UserError, match=f"{REFERENCE_FILE} does not exist; rerun finetune"):
        collect(changed, tiny_8bit_dir, tmp_path, ORIGINAL)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_merged_model_needs_only_transformers(exported, adapter, tiny_8bit_dir, dtype, most):
    merge(tiny_8bit_dir, adapter, exported / MERGED, dtype)
    compared = compare(adapter, exported / MERGED)
    assert compared["max_logit_difference"] < most
    merged = AutoModelForCausalLM.from_pretrained(exported / MERGED)
    assert not hasattr(merged.config, "quantization_config")
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert (exported / MERGED / "tokenizer.json").is_file()
    assert adapter_bytes(exported) < 200_000


def test_merged_matrix_is_rounded_once(exported, adapter, tiny_8bit_dir):
    """Compare with float64: dequantized exactly, adapter product added, rounded to 16 bits."""
    merge(tiny_8bit_dir, adapter, exported / MERGED, torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(exported / MERGED).transformer.h[0].attn.q_proj
    base = load_model(tiny_8bit_dir, torch.float32, CPU)
    adapted = load_adapter(base, adapter).base_model.model.transformer.h[0].attn.q_proj
    restored = gptj8.dequantize_blockwise(adapted.base_layer.quantized_weight).double()
    a, b = (adapted.lora_A.default.weight.double(), adapted.lora_B.default.weight.double())
    expected = restored + adapted.scaling["default"] * (b @ a)
    error = (merged.weight.double() - expected).abs() / expected.abs()
    assert error.max() < 2**-8  # half a unit in bfloat16's last place, plus float32 rounding
    wrong = (restored.bfloat16().double() - expected).abs() / expected.abs()
    assert wrong.max() > 2**-8


@pytest.mark.slow
@pytest.mark.parametrize("target", [["wte", "q_proj"], ["fc_in"]], ids=str)
def test_other_modules_are_merged(tiny_8bit_dir, tmp_path, target):
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    adapted = add_adapter(model, AdapterSpec("lora", target, 4, 8, 0.0))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    save_reference(tmp_path / "adapter", adapted, PROMPTS, [0])
    merge(tiny_8bit_dir, tmp_path / "adapter", tmp_path / MERGED, torch.float32)
    assert compare(tmp_path / "adapter", tmp_path / MERGED)["max_logit_difference"] < 1e-5


def test_trained_layernorms_are_merged(tiny_8bit_dir, tmp_path):
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    adapted = add_adapter(model, AdapterSpec("layernorm"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    save_reference(tmp_path / "adapter", adapted, PROMPTS, [0])
    merge(tiny_8bit_dir, tmp_path / "adapter", tmp_path / MERGED, torch.float32)
    assert compare(tmp_path / "adapter", tmp_path / MERGED)["max_logit_difference"] < 1e-5


def test_model_card_has_the_hubs_format():
    text = model_card(PARAMS, METRICS, DATASET)
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "peft"
    assert data["base_model"] == "models/tiny"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "rows.csv", "type": "local", "split": "test"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
    assert "| tuned | 0.875 (0.8 to 0.925) |" in body
    assert "1,234 rows" in body
    assert "the same tokens as the trained model for 99 of 100 prompts" in body
    assert "at most 0.125" in body
    assert "98 of 100 prompts, and its perplexity is 1.00020 times" in body
    assert "| gpt4 | 0.5 |" in body
    assert "macro_f1" not in body  # not measured
    assert "0123456789abcdef" in body
    assert "rows.csv" in body


def test_model_card_without_results_has_no_empty_sentences():
    chat = model_card(PARAMS, {}, {"labels": [], "chat": {"template": "x", "learn": "all"}})
    assert "apply_chat_template(messages, add_generation_prompt=True" in chat
    assert "The prompt template is" not in chat
    body = model_card(PARAMS, {}, {"labels": []})
    assert "\n.\n" not in body and "the  rows" not in body and "| system |" not in body
    assert "This adapter was not evaluated." in body
    one = model_card(PARAMS, {"evaluate": {"tuned/accuracy": 1.0}}, {"rows": {"test": 1}})
    assert "Results on 1 row of the test split:" in one and "confidence" not in one


def test_dataset_description_includes_digests(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": ["a"], "task": "classification"}')
    (tmp_path / "inputs.json").write_text('{"files": [], "prepared": "x.dir"}')
    described = describe_dataset(tmp_path, tmp_path / "inputs.json")
    assert described == {
        "labels": ["a"],
        "task": "classification",
        "files": [],
        "prepared": "x.dir",
    }


def test_progress_of_the_new_process_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(
        "gptj8.runtime.progress._speaker", ""
    )  # a stage that failed earlier in this process may have left its name
    monkeypatch.setattr("gptj8.runtime.progress.LOG_SECONDS", 0)
    code = "import sys; print('1 of 2'); print('2 of 2'); print('{}'); sys.exit('no memory')"
    assert reference_answers._run([sys.executable, "-c", code], os.environ) == (
        1,
        "{}\n",
        "no memory\n",
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        "answers in a new process: 1 of 2 prompts",
        "answers in a new process: 2 of 2 prompts",
    ]
