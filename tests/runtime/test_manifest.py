"""The manifest detects every kind of change to a model's files."""

import json
import shutil

import pytest
import torch

from gptj8.model.loading import load_model
from gptj8.runtime.errors import UserError
from gptj8.runtime.manifest import verify_manifest


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.fixture
def model(tiny_8bit_dir, tmp_path):
    """Return a copy of a model that the test may damage."""
    return shutil.copytree(tiny_8bit_dir, tmp_path / "model")


def test_an_unchanged_model_passes(model, tiny_model_dir):
    assert verify_manifest(model) == len(list(model.iterdir())) - 1
    assert verify_manifest(tiny_model_dir) is None


@pytest.mark.parametrize("offset", [3, 200, -70_000, -1])
def test_a_flipped_bit_is_detected_before_the_weights_are_loaded(model, offset):
    flip(model / "model.safetensors", offset)
    with pytest.raises(UserError, match=r"model\.safetensors was altered: its SHA-256 is \w{64}"):
        load_model(model, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda m: flip(m / "config.json", 5), r"config\.json was altered"),
        (
            lambda m: shutil.copy(m / "model.safetensors", m / "model-2.safetensors"),
            r"model-2\.safetensors is not in manifest\.json",
        ),
        (lambda m: (m / "manifest.json").write_text("[]"), "is not a manifest"),
        (lambda m: (m / "manifest.json").write_text("{"), "is not valid JSON"),
        (
            lambda m: (m / "manifest.json").write_text(json.dumps({"../x": "0" * 64})),
            "is not a manifest",
        ),
    ],
    ids=["missing", "config", "added", "list", "truncated", "outside"],
)
def test_damage_is_named(model, damage, message):
    damage(model)
    with pytest.raises(UserError, match=message):
        verify_manifest(model)


def test_all_damage_is_reported_together(model):
    flip(model / "model.safetensors", 500)
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        verify_manifest(model)
    assert len(str(caught.value).splitlines()) == 2
