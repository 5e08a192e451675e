"""Test that pickles and code in models, adapters, checkpoints and datasets are never run."""

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
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def test_unpickling_a_canary_creates_the_marker(marker):
    pickle.loads(pickle.dumps(Canary(marker)))
    assert marker.exists()


@pytest.fixture
def assert_rejected(marker):
    def check(work):
        with pytest.raises(UserError):
            work()
        assert not marker.exists()

    return check


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickle_in_model_weights(
    tiny_model_dir, tmp_path, marker, assert_rejected, tally, name, how
):
    from gptj8 import Blockwise8bitConfig, convert_checkpoint

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    content = {"transformer.wte.weight": Canary(marker)}
    if how == "torch":
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    if "-of-" in name:
        index = {"weight_map": {"transformer.wte.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_rejected(lambda: convert_checkpoint(folder, tmp_path / "8bit", Blockwise8bitConfig()))
    assert_rejected(lambda: load_model(folder, torch.float32, CPU))
    tally("pickle in a model's weights", not marker.exists())


def test_pickle_in_adapter_weights(tiny_8bit_dir, tmp_path, marker, assert_rejected, tally):
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Canary(marker)}, tmp_path / "adapter_model.bin")
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    assert_rejected(lambda: load_adapter(model, tmp_path))
    tally("pickle in an adapter's weights", not marker.exists())


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "state.json"])
def test_pickle_in_a_checkpoint(tmp_path, marker, tally, name):
    states = SavedStates(tmp_path / "states", "k" * 64, None)
    folder = states.save(1, {"weight": torch.zeros(3)})
    (folder / name).write_bytes(pickle.dumps(Canary(marker)))
    states.latest()
    assert not marker.exists()
    tally("pickle in a checkpoint", not marker.exists())


@pytest.mark.parametrize("name", ["train.pkl", "train.pt", "train.npy", "train.csv", "train.json"])
def test_pickle_in_a_dataset(tmp_path, marker, tally, name):
    from gptj8.dataset.prepared.text_encoder import TextEncoder
    from gptj8.dataset.validation.run import validate
    from tests.helpers.labelled_rows import byte_tokenizer

    file = tmp_path / "data" / name
    file.parent.mkdir()
    if name.endswith(".npy"):
        np.save(file, np.array([Canary(marker)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps([Canary(marker)]))
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
    assert not marker.exists()
    tally("pickle in a dataset", not marker.exists())


def test_code_in_a_model_folder_is_not_run(
    tiny_model_dir, tmp_path, marker, assert_rejected, tally
):
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
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    assert_rejected(lambda: load_model(folder, torch.float32, CPU))
    tally("code in a model folder", not marker.exists())
