"""The export: complete, equal to the trained model, and mergeable without loss."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gptj8.adapters import add_adapter
from gptj8.errors import UserError
from gptj8.export import MERGED, adapter_bytes, collect, compare_with_trained, merge, model_card
from gptj8.models import load_model
from gptj8.params import parse_params, resolved
from gptj8.reference import save_reference

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
PARAMS = resolved(parse_params({"data": {"train": "rows.csv"}, "model": {"path": "models/tiny"}}))
METRICS = {"evaluate": {"tuned/accuracy": 0.875, "base/accuracy": 0.25}, "convert": {"seconds": 1}}


@pytest.fixture(scope="module")
def adapter(tiny_8bit_dir, tmp_path_factory):
    """An adapter as finetune leaves it: not at zero, with the reference beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    model = add_adapter(model, "lora", "all-linear", 4, 8, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    save_reference(folder, model, PROMPTS)
    return folder


@pytest.fixture
def exported(adapter, tiny_8bit_dir, tmp_path):
    collect(adapter, tiny_8bit_dir, tmp_path, PARAMS, METRICS)
    return tmp_path


def test_it_holds_what_a_user_needs(exported, adapter):
    names = {file.name for file in exported.iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "params.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((exported / "params.json").read_text())["finetune"]["r"] == 8
    assert adapter_bytes(exported) == sum(f.stat().st_size for f in exported.iterdir())


def test_it_equals_the_trained_model(exported, adapter, tiny_8bit_dir):
    assert compare_with_trained(exported, adapter, tiny_8bit_dir, torch.float32, CPU) == 0.0


def test_a_different_adapter_is_noticed(exported, adapter, tiny_8bit_dir):
    from safetensors.torch import load_file, save_file

    file = exported / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "lora_B" in name)
    save_file({**state, name: state[name] + 0.1}, file, metadata={"format": "pt"})
    assert compare_with_trained(exported, adapter, tiny_8bit_dir, torch.float32, CPU) > 0.01


def test_an_incomplete_adapter_is_refused(tiny_8bit_dir, tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json; rerun finetune"):
        collect(tmp_path / "adapter", tiny_8bit_dir, tmp_path, PARAMS, METRICS)


def test_the_merged_model_needs_nothing_but_transformers(exported, adapter, tiny_8bit_dir):
    difference = merge(exported, tiny_8bit_dir, adapter, CPU)
    assert 0 < difference < 0.05  # the weights are rounded to 16 bits
    merged = AutoModelForCausalLM.from_pretrained(exported / MERGED, dtype=torch.float32).eval()
    assert not hasattr(merged.config, "quantization_config")
    base = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    adapted = PeftModel.from_pretrained(base, exported).eval()
    ids = torch.tensor([PROMPTS[1]])
    expected = adapted(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0.05, atol=0.02)
    assert (exported / MERGED / "tokenizer.json").is_file()


def test_the_card_is_in_the_hubs_format():
    text = model_card(PARAMS, METRICS)
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "peft"
    assert data["base_model"] == "models/tiny"
    assert "| tuned/accuracy | 0.875 |" in body
    assert "rows.csv" in body
