"""Shared fixtures: small random models and tokenizers in the usual formats, and small projects."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Set this before torch is imported here or in a child process. Models this small run faster on one
# thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from gptj8.runtime.process import set_defaults

set_defaults()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards box with five big liquor jugs"
)


def make_tokenizer(folder: Path, vocab_size: int = 384) -> None:
    """Train a byte-level BPE tokenizer on a few words and save it as transformers does."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [WORDS] * 4, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)


def gptj_config(**changes):
    """Return the config of a 2-layer GPT-J that trains in seconds."""
    from transformers import GPTJConfig

    defaults = {
        "vocab_size": 400,
        "n_positions": 128,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTJConfig(**{**defaults, **changes})


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random float32 GPT-J and its tokenizer. Tests must not change it."""
    import torch
    from transformers import GPTJForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-gptj"
    torch.manual_seed(7)
    GPTJForCausalLM(gptj_config()).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_8bit_dir(tiny_model_dir: Path) -> Path:
    """Return the same model converted to 8 bits. Tests must not change it."""
    import gptj8

    target = tiny_model_dir.parent / "tiny-gptj-8bit"
    gptj8.convert_checkpoint(tiny_model_dir, target, gptj8.Blockwise8bitConfig(block_size=256))
    return target


@pytest.fixture(scope="session")
def empty_tracking_database(tmp_path_factory):
    """Return a database with MLflow's tables, to be copied: creating them takes seconds."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def project(tmp_path, monkeypatch, empty_tracking_database):
    """Return a project folder with input files and an MLflow database, as working directory."""
    shutil.copyfile(empty_tracking_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def recorded_inline(monkeypatch):
    """Record stages in the test's process instead of a recorder process, which starts slowly.

    tests/tracking/test_faults.py and tests/pipeline test the recorder process.
    """
    from gptj8.tracking import recorder, sending, stage

    class Inline:
        stdin = None

        def __init__(self, journal: Path) -> None:
            self.journal = journal
            recorder.describe(journal, Path.cwd())

        def poll(self) -> int:
            delivery = sending.open_delivery(self.journal)
            assert delivery.advance()
            sending.finish(self.journal, delivery)
            return 0

    monkeypatch.setattr(stage, "start_recorder", Inline)


@pytest.fixture
def recorded_beside(recorded_inline, monkeypatch):
    """Use the real recorder process in a module that records inline by default."""
    from gptj8.tracking import recorder, stage

    monkeypatch.setattr(stage, "start_recorder", recorder.start_recorder)
