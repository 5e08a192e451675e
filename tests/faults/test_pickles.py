"""A pickle that says when it is run, in every place where one could lie: it never is."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gptj8.dataset.readers.sources import find_sources
from gptj8.model.loading import load_adapter, load_model
from gptj8.params.sections import Data
from gptj8.runtime.errors import UserError
from gptj8.training.saved_states import SavedStates

CPU = torch.device("cpu")


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, song: Path) -> None:
        self.song = song

    def __reduce__(self):
        return Path.touch, (self.song,)


@pytest.fixture
def song(tmp_path):
    return tmp_path / "song"


def test_the_canary_sings(song):
    pickle.loads(pickle.dumps(Canary(song)))
    assert song.exists()


@pytest.fixture
def refused(song):
    def refuses(work):
        with pytest.raises(UserError):
            work()
        assert not song.exists()

    return refuses


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_in_a_models_weights(tiny_model_dir, tmp_path, song, refused, tally, name, how):
    from gptj8 import Blockwise8bitConfig, convert_checkpoint

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    content = {"transformer.wte.weight": Canary(song)}
    if how == "torch":
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    if "-of-" in name:
        index = {"weight_map": {"transformer.wte.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(lambda: convert_checkpoint(folder, tmp_path / "8bit", Blockwise8bitConfig()))
    refused(lambda: load_model(folder, torch.float32, CPU))
    tally("pickle in a model's weights", not song.exists())


def test_in_an_adapters_weights(tiny_8bit_dir, tmp_path, song, refused, tally):
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Canary(song)}, tmp_path / "adapter_model.bin")
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    refused(lambda: load_adapter(model, tmp_path))
    tally("pickle in an adapter's weights", not song.exists())


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "state.json"])
def test_in_a_checkpoint(tmp_path, song, tally, name):
    states = SavedStates(tmp_path / "states", "k" * 64, None)
    folder = states.save(1, {"weight": torch.zeros(3)})
    (folder / name).write_bytes(pickle.dumps(Canary(song)))
    states.latest()
    assert not song.exists()
    tally("pickle in a checkpoint", not song.exists())


@pytest.mark.parametrize("name", ["train.pkl", "train.pt", "train.npy", "train.csv", "train.json"])
def test_in_a_dataset(tmp_path, song, tally, name):
    from gptj8.dataset.prepared.prompts import TextEncoder
    from gptj8.dataset.validation.run import validate
    from tests.helpers.labelled_rows import byte_tokenizer

    file = tmp_path / "data" / name
    file.parent.mkdir()
    if name.endswith(".npy"):
        np.save(file, np.array([Canary(song)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps([Canary(song)]))
    data = Data(train=str(file))
    encoder = TextEncoder(byte_tokenizer(), eos_id=0)

    def work():
        find_sources(data)
        (tmp_path / "out").mkdir()
        validated = validate(data, encoder, tmp_path / "out")
        if validated.problems:
            raise UserError("\n".join(validated.problems))

    with pytest.raises(UserError):
        work()
    assert not song.exists()
    tally("pickle in a dataset", not song.exists())


def test_code_beside_a_model_is_not_run(tiny_model_dir, tmp_path, song, refused, tally):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unheard-of",
        "auto_map": {
            "AutoConfig": "code.CanaryConfig",
            "AutoModelForCausalLM": "code.CanaryModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(song)!r}).touch()\n")
    refused(lambda: load_model(folder, torch.float32, CPU))
    tally("code beside a model", not song.exists())
