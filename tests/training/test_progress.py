"""The progress of training."""

from types import SimpleNamespace

import pytest

from gptj8.training.progress import TrainingProgress


class CountedHistory(list):
    """A history that counts the points that are read."""

    read = 0

    def __iter__(self):
        for point in super().__iter__():
            CountedHistory.read += 1
            yield point

    def __getitem__(self, index):
        found = super().__getitem__(index)
        CountedHistory.read += len(found) if isinstance(index, slice) else 1
        return found


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(CountedHistory, "read", 0)
    return SimpleNamespace(history=CountedHistory(), tokens_per_second=1000.0)


def test_each_point_is_read_once(measured):
    with TrainingProgress(measured) as progress:
        state = SimpleNamespace(max_steps=500, global_step=0)
        progress.on_train_begin(None, state, None)
        for state.global_step in range(1, 501):
            measured.history.append({"step": state.global_step, "loss": 1 / state.global_step})
            progress.on_step_end(None, state, None)
    assert CountedHistory.read == 500


def test_the_latest_values_are_shown(measured):
    progress = TrainingProgress(measured)
    measured.history.append({"step": 1, "loss": 2.0})
    measured.history.append({"step": 1, "eval_loss": 1.5})
    assert progress._facts() == "loss 2.000, validation loss 1.500, 1,000 tokens/s"
    measured.history.append({"step": 2, "loss": 1.0, "eval_accuracy": 0.5})
    assert progress._facts() == "loss 1.000, accuracy 50.0%, 1,000 tokens/s"
    # Training went back to a saved step: the history is shorter.
    del measured.history[1:]
    assert progress._facts().startswith("loss 1.000")
    measured.history.append({"step": 2, "loss": 0.25})
    assert progress._facts().startswith("loss 0.250")
