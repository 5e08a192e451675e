"""Test that flipped bits and truncated files are detected and named before they are used."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.model.loading import load_adapter, load_model
from gptj8.runtime.errors import UserError
from gptj8.runtime.manifest import MANIFEST, verify_manifest
from gptj8.training.saved_states import SavedStates
from gptj8.training.state import random_state

_FOLDERS = {
    "converted model": "artifacts/base-8bit",
    "dataset": "artifacts/dataset",
    "adapter": "artifacts/adapter",
    "export": "artifacts/export",
    "checkpoint": "checkpoints/kkkkkkkkkkkkkkkk/step-000000003",
}


@pytest.fixture(scope="module")
def project(reference, tmp_path_factory):
    """A project with its artifacts and a checkpoint."""
    twin = reference.copy(tmp_path_factory.mktemp("flipped") / "project")
    states = SavedStates(twin.folder / "checkpoints", "k" * 64, None)
    states.save(3, {"weights": torch.randn(64, 64), "random": random_state()})
    return twin.folder


def covered(folder: Path) -> list[Path]:
    """Return the manifest of a folder and the files it lists."""
    names = json.loads((folder / MANIFEST).read_text())
    return [folder / MANIFEST, *(folder / name for name in names)]


def is_found(folder: Path, file: Path) -> bool:
    """Return whether the error names the damaged file or, for a manifest, its folder."""
    try:
        verify_manifest(folder)
    except UserError as error:
        return str(file) in str(error) or (file.name == MANIFEST and str(folder) in str(error))
    return False


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def flip_many(project, tally, count):
    draw, missed = random.Random(2), []
    kinds = list(_FOLDERS)
    for trial in range(count):
        kind = kinds[trial % len(kinds)]
        folder = project / _FOLDERS[kind]
        file = draw.choice(covered(folder))
        content = file.read_bytes()
        bit = draw.randrange(8 * len(content))
        file.write_bytes(flipped(content, bit))
        found = is_found(folder, file)
        file.write_bytes(content)
        tally("bit flipped", found)
        if not found:
            missed.append(f"bit {bit} of {file}")
    return missed


def truncate_many(project, tally, offsets):
    """Truncate safetensors files at bytes of their headers and at random offsets."""
    draw, missed = random.Random(3), []
    for kind in ("converted model", "adapter", "checkpoint"):
        folder = project / _FOLDERS[kind]
        for file in folder.glob("*.safetensors"):
            content = file.read_bytes()
            header = 8 + int.from_bytes(content[:8], "little")
            lengths = [*range(0, header, 1 if offsets > 100 else 50)]
            lengths += [draw.randrange(header, len(content)) for _ in range(offsets)]
            for length in lengths:
                file.write_bytes(content[:length])
                found = is_found(folder, file)
                tally("file truncated", found)
                if not found:
                    missed.append(f"{file} truncated to {length}")
            file.write_bytes(content)
    return missed


@pytest.mark.slow
def test_flipped_bits_are_detected(project, tally):
    assert not flip_many(project, tally, 300)


@pytest.mark.slow
def test_truncated_files_are_detected(project, tally):
    assert not truncate_many(project, tally, 10)


@pytest.mark.faults
def test_many_flipped_bits_are_detected(project, tally):
    assert not flip_many(project, tally, 10_000)


@pytest.mark.faults
def test_files_truncated_at_many_offsets_are_detected(project, tally):
    assert not truncate_many(project, tally, 1_000)


def use(kind: str, project: Path) -> object:
    base, adapter = project / _FOLDERS["converted model"], project / _FOLDERS["adapter"]
    if kind == "converted model":
        return load_model(base, torch.float32, torch.device("cpu"))
    if kind == "dataset":
        return load_prepared(project / _FOLDERS[kind])
    model = load_model(base, torch.float32, torch.device("cpu"))
    return load_adapter(model, adapter if kind == "adapter" else project / _FOLDERS[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("converted model", "config.json"),
        ("converted model", "model*.safetensors"),
        ("dataset", "train.arrow"),
        ("dataset", "test.parquet"),
        ("adapter", "adapter_model.safetensors"),
        ("adapter", "adapter_config.json"),
        ("export", "adapter_model.safetensors"),
    ],
)
def test_damaged_files_raise(project, kind, name):
    (file,) = (project / _FOLDERS[kind]).glob(name)
    kept = file.with_name("kept")
    shutil.copyfile(file, kept)
    try:
        file.write_bytes(flipped(file.read_bytes(), 4 * file.stat().st_size))
        with pytest.raises(UserError, match=f"{name[:5]}.* was altered: its SHA-256 is"):
            use(kind, project)
    finally:
        kept.replace(file)
    use(kind, project)


@pytest.mark.slow
def test_damaged_checkpoint_is_not_used(project, capsys):
    states = SavedStates(project / "checkpoints", "k" * 64, None)
    file = project / _FOLDERS["checkpoint"] / "tensors.safetensors"
    content = file.read_bytes()
    file.write_bytes(flipped(content, 4 * len(content)))
    assert states.latest() is None
    assert f"{file} was altered" in capsys.readouterr().err
    file.write_bytes(content)
    assert states.latest().step == 3
