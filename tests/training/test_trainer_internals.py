"""What `CompletionTrainer` relies on of transformers' Trainer that is not its public interface.

A new version of transformers may change any of it without notice: pyproject.toml admits one minor
version, and whoever raises that looks here first.
"""

import inspect
import re
import tomllib

import pytest
from transformers import Trainer

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
    "_run_epoch": ["self", "model", "epoch"],  # the first ones; the others are passed on
}
ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")


def test_every_overridden_private_method_is_named_here():
    own = {name for name in vars(CompletionTrainer) if re.match("_[a-z]", name)}
    assert own & set(dir(Trainer)) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_parameters_that_are_relied_on(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert found[: len(METHODS[name])] == METHODS[name]
    if name != "_run_epoch":
        assert found == METHODS[name]


def test_attributes_that_are_read_and_set_are_still_used_by_trainer():
    source = inspect.getsource(Trainer)
    own = inspect.getsource(CompletionTrainer)
    for name in ATTRIBUTES:
        assert f"self.{name}" in own and f"self.{name}" in source


def test_the_version_of_transformers_is_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [d for d in project["dependencies"] if d.startswith("transformers")]
    assert re.fullmatch(r"transformers>=5\.\d+,<5\.\d+", requirement)
