"""A training run of a few seconds, for tests that interrupt or compare runs."""

import contextlib
from dataclasses import asdict, replace

import pytest
import torch

from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import load_model
from gptj8.training.loop import train
from gptj8.training.settings import TrainingSettings
from gptj8.training.trainer import CompletionTrainer

CPU = torch.device("cpu")
ROWS = [("the quick brown fox", "dog"), ("seven wizards box", "jugs"), ("a lazy dog", "fox")] * 4
SETTINGS = TrainingSettings(
    learning_rate=2e-2,
    num_train_epochs=3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    logging_steps=2,
    eval_steps=4,
    warmup_ratio=0.2,
    seed=3,
)
"""Three steps per epoch, nine in total; loss at 2, 4, 6, 8 and validation at 4, 8, 9."""

_TIMINGS = ("seconds", "tokens_per_second", "samples_per_second", "memory_gib")


def rows(folder):
    """Return examples of different lengths, encoded for the model in a folder."""
    prompts = PromptEncoder(TextEncoder.load(folder), "{text} =", 32)
    encoded = [prompts.example(text, completion) for text, completion in ROWS]
    return [
        {"input_ids": e.ids, "learned": [e.prompt_length, len(e.ids)], "length": len(e.ids)}
        for e in encoded
    ]


def adapted_model(folder, method="lora", dropout=0.1, dtype=torch.float32, **adapter):
    """Return the model with an untrained adapter, identical on every call."""
    torch.manual_seed(0)
    model = load_model(folder, dtype, CPU)
    return add_adapter(model, AdapterSpec(method, "all-linear", 4, 8, dropout, **adapter))


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def lasting(result):
    """Return a training result without its timings."""
    found = {k: v for k, v in asdict(result).items() if k not in _TIMINGS}
    found["history"] = [
        {k: v for k, v in point.items() if k not in _TIMINGS} for point in found["history"]
    ]
    return found


def changed(**changes):
    return replace(SETTINGS, **changes)


def accuracy(model, batch_size):
    """Return a number computed from the weights; draws random numbers, as a metric might."""
    return float(sum(w.abs().sum() for w in weights_of(model).values()) + torch.rand(()) * 0)


def trained(
    folder, examples, settings=SETTINGS, checkpoints=None, log=None, measure=accuracy, **model
):
    adapted = adapted_model(folder, **model)
    log = log or (lambda values, step: None)
    result = train(adapted, examples, examples, settings, 0, log, measure, checkpoints)
    return weights_of(adapted), lasting(result)


@contextlib.contextmanager
def interrupted_at(monkeypatch, call, error=KeyboardInterrupt):
    """Make the micro-batch with number `call` raise an error once."""
    original, calls = CompletionTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise error
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CompletionTrainer, "compute_loss", compute_loss)
        yield


def assert_resumes(folder, examples, checkpoints, monkeypatch, call, settings, **more):
    """Interrupt training at a call, resume it and compare; return what was found."""
    wanted = trained(folder, examples, settings, **more)
    states = checkpoints(None)
    with interrupted_at(monkeypatch, call), pytest.raises(KeyboardInterrupt):
        trained(folder, examples, settings, states, **more)
    assert states.latest() is not None
    found = trained(folder, examples, settings, states, **more)
    assert_same(found, wanted)
    return found


def assert_same(found, wanted):
    for name, weight in wanted[0].items():
        assert torch.equal(found[0][name], weight), name
    assert found[1] == wanted[1]
