"""Test the private interface of transformers' Trainer that `CompletionTrainer` relies on.

A new version of transformers may change it without notice. So pyproject.toml allows only one minor
version; check these tests first when raising it.
"""

import inspect
import re
import tomllib

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import load_model
from gptj8.training.settings import TrainingSettings, training_arguments
from gptj8.training.trainer import CompletionTrainer
from tests.helpers.paths import ROOT

METHODS = {
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
    "_maybe_log_save_evaluate": [
        "self",
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
    "_run_epoch": ["self", "model", "epoch"],  # only the first; the others are passed through
}
ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")


def test_all_overridden_private_methods_are_listed():
    own = {name for name in vars(CompletionTrainer) if re.match("_[a-z]", name)}
    assert own & set(dir(Trainer)) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_method_has_the_expected_parameters(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert found[: len(METHODS[name])] == METHODS[name]
    if name != "_run_epoch":
        assert found == METHODS[name]


def test_trainer_still_uses_the_private_attributes():
    source = inspect.getsource(Trainer)
    own = inspect.getsource(CompletionTrainer)
    for name in ATTRIBUTES:
        assert f"self.{name}" in own and f"self.{name}" in source


def test_several_gpus_in_one_process_are_not_copies(tiny_8bit_dir, monkeypatch, tmp_path):
    set_up = TrainingArguments._setup_devices.func

    def set_up_with_two_gpus(arguments):
        device = set_up(arguments)
        arguments._n_gpu = 2
        return device

    monkeypatch.setattr(TrainingArguments._setup_devices, "func", set_up_with_two_gpus)
    plain = TrainingArguments(output_dir=tmp_path, use_cpu=True)
    assert plain.n_gpu == 2
    model = add_adapter(
        load_model(tiny_8bit_dir, torch.float32, torch.device("cpu")), AdapterSpec()
    )
    settings = TrainingSettings(1e-3, 1, per_device_train_batch_size=4)
    arguments = training_arguments(settings, tmp_path, model)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 4 and arguments.eval_batch_size == 4
    # Trainer wraps a model in DataParallel, which copies it, if n_gpu is larger than 1.
    trainer = Trainer(model, arguments, eval_dataset=[{}])
    assert trainer._train_batch_size == settings.rows_per_step == 4


def test_transformers_version_is_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [d for d in project["dependencies"] if d.startswith("transformers")]
    assert re.fullmatch(r"transformers>=5\.\d+,<5\.\d+", requirement)
