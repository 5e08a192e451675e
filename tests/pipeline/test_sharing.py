"""Share results with DVC: a second clone and an applied experiment, without recipes in use."""

from __future__ import annotations

import pytest

from tests.helpers.project_clone import STAGES, Clone, ran

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    """A project with its own dataset and model, run once; no recipe is in use."""
    clone = Clone(tmp_path_factory.mktemp("sharing") / "project", tiny_model_dir)
    assert ran(clone.dvc("repro")) == list(STAGES)
    clone.dvc("remote", "add", "--default", "store", str(clone.folder.parent / "store"))
    clone.git("add", "-A")
    clone.git("commit", "--quiet", "-m", "run")
    return clone


def assert_done(process):
    assert process.returncode == 0, process.stderr
    assert "ERROR" not in process.stderr


def test_checkout_restores_removed_outputs(clone):
    adapter = clone.folder / "artifacts" / "adapter" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.unlink()
    assert_done(clone.dvc("checkout", "--force"))
    assert adapter.read_bytes() == content
    assert ran(clone.dvc("repro")) == []


def test_second_clone_pulls_and_reruns_nothing(clone):
    assert_done(clone.dvc("push"))
    colleague = object.__new__(Clone)
    colleague.folder = clone.folder.parent / "colleague"
    clone.git("clone", "--quiet", str(clone.folder), str(colleague.folder))
    assert_done(colleague.dvc("pull"))
    assert (colleague.folder / "artifacts" / "export" / "README.md").is_file()
    assert ran(colleague.dvc("repro")) == []


def test_applied_experiment_is_up_to_date(clone):
    assert_done(clone.dvc("exp", "run", "--name", "smaller", "-S", "finetune.r=2"))
    clone.git("checkout", "--", ".")
    assert_done(clone.dvc("checkout", "--force"))
    assert_done(clone.dvc("exp", "apply", "smaller"))
    assert "r: 2" in (clone.folder / "params.yaml").read_text()
    assert ran(clone.dvc("repro")) == []


def test_unused_recipe_runs_when_needed(clone):
    """The first run replaces the empty output, which counts as missing."""
    clone.edit_params(data={"train": "data/datasets/hub/splits"})
    failed = clone.dvc("repro", "validate")
    assert "data/datasets/hub/dvc.yaml:fetch" in failed.stdout
    clone.git("checkout", "--", "params.yaml")
