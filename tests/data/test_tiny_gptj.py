"""Tests of the tiny GPT-J recipe, with a corpus and settings that train in a few seconds."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptj8.runtime.errors import UserError
from tests.helpers.paths import ROOT

RECIPE = ROOT / "data" / "models" / "tiny-gptj"
FILES = ("muon.py", "train.py")
SMALL = {
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "rotary_dim": 8,
    "sequence_length": 32,
    "batch_size": 8,
    "steps": 12,
    "warmup_steps": 2,
}


def write_recipe(root: Path, documents: int = 400, **changes: object) -> Path:
    """Write the recipe and a corpus in the layout of the repository."""
    folder = root / "data" / "models" / "tiny-gptj"
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copy(RECIPE / name, folder)
    params = YAML(typ="safe").load(RECIPE / "params.yaml") | SMALL | changes
    YAML(typ="safe").dump(params, folder / "params.yaml")
    if documents:
        corpus = root / "data" / "datasets" / "docstrings" / "corpus.jsonl"
        corpus.parent.mkdir(parents=True)
        rng = random.Random(0)
        words = ["array", "naïve", "tensor", "\n\n    >>> x = 1", "of", "the", "Größe", "plot"]
        rows = ({"text": " ".join(rng.choices(words, k=20))} for _ in range(documents))
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def muon(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("muon")


@pytest.fixture
def train(muon: ModuleType) -> ModuleType:
    return importlib.import_module("train")


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_recipe(tmp_path_factory.mktemp("tiny"))
    result = run(folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_transformers_loads_the_model_as_gptj(recipe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(recipe / "model")
    tokenizer = AutoTokenizer.from_pretrained(recipe / "model")
    assert model.config.architectures == ["GPTJForCausalLM"]
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert len(tokenizer) == model.config.vocab_size == SMALL["vocab_size"]
    text = "any text: 日本 \t\n  x[0]"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_loss_is_below_uniform(recipe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(recipe / "model")
    tokenizer = AutoTokenizer.from_pretrained(recipe / "model")
    ids = torch.tensor([tokenizer("array of the tensor plot of the array")["input_ids"]])
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    uniform = torch.tensor(float(SMALL["vocab_size"])).log().item()  # type: ignore[arg-type]
    assert loss < uniform - 0.5


@pytest.mark.slow
def test_same_seed_gives_byte_identical_files(recipe: Path, tmp_path: Path) -> None:
    made = {path.name: path.read_bytes() for path in (recipe / "model").iterdir()}
    same = write_recipe(tmp_path / "same")
    assert run(same).returncode == 0
    assert made == {path.name: path.read_bytes() for path in (same / "model").iterdir()}

    other = write_recipe(tmp_path / "other", seed=1)
    assert run(other).returncode == 0
    weights = (other / "model" / "model.safetensors").read_bytes()
    assert weights != made["model.safetensors"]


@pytest.mark.parametrize(
    ("documents", "changes", "named"),
    [
        (0, {}, ["corpus.jsonl"]),
        (3, {}, ["corpus.jsonl", "sequences are too few"]),
        (3, {"stepz": 3, "n_layer": 0}, ["stepz", "n_layer"]),
        (3, {"n_head": 5}, ["n_head 5"]),
        (3, {"muon_learning_rate": float("inf")}, ["muon_learning_rate = inf"]),
        (400, {"embedding_learning_rate": 1e30}, ["held-out loss is nan; lower the learning"]),
    ],
)
def test_invalid_inputs_raise_and_leave_no_files(
    train: ModuleType, tmp_path: Path, documents: int, changes: dict[str, object], named: list[str]
) -> None:
    folder = write_recipe(tmp_path, documents, **changes)
    with pytest.raises(UserError) as error:
        train.main(folder)
    assert all(name in str(error.value) for name in named), error.value
    assert {path.name for path in folder.iterdir()} == {*FILES, "params.yaml"}


def test_malformed_corpus_raises(train: ModuleType, tmp_path: Path) -> None:
    folder = write_recipe(tmp_path)
    corpus = folder / train.CORPUS
    for content in ('{"text": "a"', '{"words": "a"}', "[]"):
        corpus.write_text(content + "\n")
        with pytest.raises(
            UserError, match=r"corpus\.jsonl was not written by the docstrings recipe"
        ):
            train.main(folder)


def test_error_is_printed_as_one_line(tmp_path: Path) -> None:
    result = run(write_recipe(tmp_path, documents=0))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "corpus.jsonl" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)], ids=str)
def test_orthogonalize_keeps_singular_vectors_and_equalizes_values(
    muon: ModuleType, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.3, 3, min(shape), dtype=torch.float64)) @ v
    result = muon.orthogonalize(matrix, steps=5, dtype=torch.float64)
    sizes = u.T @ result @ v.T
    assert torch.allclose(sizes, torch.diag(sizes.diagonal()), atol=1e-9)
    assert 0.6 < sizes.diagonal().min() and sizes.diagonal().max() < 1.3


def test_muon_matches_torch_in_bfloat16(muon: ModuleType) -> None:
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (4, 6))] for _ in range(2)
    )
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = (
        muon.Muon(ours, **settings, steps=5, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, **settings, ns_steps=5),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
