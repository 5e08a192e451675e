"""Checkpoints as training programs write them around a model."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import gptj8
from gptj8.model.loading import load_model
from gptj8.runtime.errors import UserError

CONFIG = gptj8.Blockwise8bitConfig(block_size=256)
IDS = torch.arange(2, 14)[None]


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def in_file(key, **others):
    return lambda state: {key: prefixed("model.")(state), **others}


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model."]
FILES = {
    "lightning": in_file("state_dict", epoch=3, **{"pytorch-lightning_version": "2.5"}),
    "optimizer": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "step": 7},
    "state-dict": lambda state: {"model_state_dict": prefixed("module.")(state), "loss": 2.0},
}


def check(folder, original, tmp_path):
    """Compare what is read from the folder with what is read from the original folder."""
    gptj8.convert_checkpoint(original, tmp_path / "expected", CONFIG)
    gptj8.convert_checkpoint(folder, tmp_path / "found", CONFIG)
    expected, found = (load_file(tmp_path / n / "model.safetensors") for n in ("expected", "found"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    arguments = torch.float32, torch.device("cpu")
    with torch.no_grad():
        logits = [load_model(f, *arguments)(IDS).logits for f in (original, folder)]
    assert torch.equal(*logits)


@pytest.fixture(params=["gptj", "llama"])
def original(request, tiny_model_dir, tmp_path):
    if request.param == "gptj":
        return tiny_model_dir
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=200, num_attention_heads=4, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_names(original, tmp_path, prefix):
    folder = shutil.copytree(original, tmp_path / "wrapped")
    state = prefixed(prefix)(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    check(folder, original, tmp_path)


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_more_than_the_state_dict(original, tmp_path, kind):
    folder = shutil.copytree(original, tmp_path / "wrapped")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(FILES[kind](state), folder / "pytorch_model.bin")
    check(folder, original, tmp_path)


def test_an_original_model_with_a_missing_tensor_raises(tiny_model_dir, tmp_path):
    """transformers would fill it with random numbers, and only warn."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["transformer.h.1.mlp.fc_in.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor transformer.h.1.mlp.fc_in.weight$"):
        load_model(folder, torch.float32, torch.device("cpu"))


def test_8_bit_floats_are_refused_in_one_line(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    for name in [name for name, tensor in state.items() if tensor.dim() == 2]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.ones(1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"have the dtype F8_E4M3, .*dequantize=True") as raised:
        gptj8.convert_checkpoint(folder, tmp_path / "out", CONFIG)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="have the dtype F8_E4M3"):
        load_model(folder, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"is F8_E4M3 in the checkpoint, not floating-point"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIG)


@pytest.mark.parametrize("kind", ["sibling", "nested"])
def test_a_state_dict_beside_tensors_or_in_two_levels(tiny_model_dir, tmp_path, kind):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "wrapped")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    contents = {
        "sibling": {"model": state, "best_val_loss": torch.tensor(1.0)},
        "nested": {"state_dict": {"model": state}, "epoch": 3},
    }
    torch.save(contents[kind], folder / "pytorch_model.bin")
    check(folder, tiny_model_dir, tmp_path)


def test_the_same_tensor_under_two_names_is_an_error(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state |= {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"twice: as .* and module\..*; remove one"):
        gptj8.convert_checkpoint(folder, tmp_path / "out", CONFIG)
