"""Fixtures for training: examples and a folder for checkpoints."""

import pytest

from gptj8.training.saved_states import SavedStates
from tests.helpers.training_rows import rows


@pytest.fixture(scope="module")
def examples(tiny_8bit_dir):
    return rows(tiny_8bit_dir)


@pytest.fixture
def checkpoints(tmp_path):
    return lambda every=0.0: SavedStates(tmp_path / "checkpoints", "k" * 64, every)
