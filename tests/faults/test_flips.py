"""A bit that flips in, or a byte that is missing from, anything that was written: found and named
before it is used."""

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
def project(undisturbed, tmp_path_factory):
    """A project's artifacts, and a checkpoint beside them."""
    twin = undisturbed.copy(tmp_path_factory.mktemp("flipped") / "project")
    states = SavedStates(twin.folder / "checkpoints", "k" * 64, None)
    states.save(3, {"weights": torch.randn(64, 64), "random": random_state()})
    return twin.folder


def covered(folder: Path) -> list[Path]:
    """Return the files that are used of a folder: those of its manifest, and that."""
    names = json.loads((folder / MANIFEST).read_text())
    return [folder / MANIFEST, *(folder / name for name in names)]


def is_found(folder: Path, file: Path) -> bool:
    """Whether the damage of a file is told, by its name or, of the manifest, in whatever way."""
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


def cut_many(project, tally, offsets):
    """Cut safetensors files at every byte of their headers, and elsewhere."""
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
                tally("file cut short", found)
                if not found:
                    missed.append(f"{file} cut to {length}")
            file.write_bytes(content)
    return missed


@pytest.mark.slow
def test_flipped_bits_are_found(project, tally):
    assert not flip_many(project, tally, 300)


@pytest.mark.slow
def test_files_cut_short_are_found(project, tally):
    assert not cut_many(project, tally, 10)


@pytest.mark.faults
def test_many_flipped_bits_are_found(project, tally):
    assert not flip_many(project, tally, 10_000)


@pytest.mark.faults
def test_files_cut_anywhere_are_found(project, tally):
    assert not cut_many(project, tally, 1_000)


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
def test_what_is_damaged_is_not_used(project, kind, name):
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
def test_a_damaged_checkpoint_is_not_used(project, capsys):
    states = SavedStates(project / "checkpoints", "k" * 64, None)
    file = project / _FOLDERS["checkpoint"] / "tensors.safetensors"
    content = file.read_bytes()
    file.write_bytes(flipped(content, 4 * len(content)))
    assert states.latest() is None
    assert f"{file} was altered" in capsys.readouterr().err
    file.write_bytes(content)
    assert states.latest().step == 3
