"""What DVC shares: a colleague's clone, an applied experiment, while recipes are not in use."""

from __future__ import annotations

import pytest

from tests.helpers.project_clone import STAGES, Clone, ran

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model_dir):
    """A project with its own dataset and model, run once: none of the recipes is in use."""
    clone = Clone(tmp_path_factory.mktemp("sharing") / "project", tiny_model_dir)
    assert ran(clone.dvc("repro")) == list(STAGES)
    clone.dvc("remote", "add", "--default", "store", str(clone.folder.parent / "store"))
    clone.git("add", "-A")
    clone.git("commit", "--quiet", "-m", "run")
    return clone


def assert_done(process):
    assert process.returncode == 0, process.stderr
    assert "ERROR" not in process.stderr


def test_checkout_ends_well_and_brings_back_what_was_removed(clone):
    adapter = clone.folder / "artifacts" / "adapter" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.unlink()
    assert_done(clone.dvc("checkout", "--force"))
    assert adapter.read_bytes() == content
    assert ran(clone.dvc("repro")) == []


def test_a_colleague_pulls_and_runs_nothing(clone):
    assert_done(clone.dvc("push"))
    colleague = object.__new__(Clone)
    colleague.folder = clone.folder.parent / "colleague"
    clone.git("clone", "--quiet", str(clone.folder), str(colleague.folder))
    assert_done(colleague.dvc("pull"))
    assert (colleague.folder / "artifacts" / "export" / "README.md").is_file()
    assert ran(colleague.dvc("repro")) == []


def test_an_experiment_is_applied(clone):
    assert_done(clone.dvc("exp", "run", "--name", "smaller", "-S", "finetune.r=2"))
    clone.git("checkout", "--", ".")
    assert_done(clone.dvc("checkout", "--force"))
    assert_done(clone.dvc("exp", "apply", "smaller"))
    assert "r: 2" in (clone.folder / "params.yaml").read_text()
    assert ran(clone.dvc("repro")) == []


def test_a_recipe_that_has_made_nothing_runs_when_it_is_needed(clone):
    """The first run replaces the empty output, which is taken for none."""
    clone.edit_params(data={"train": "data/datasets/hub/splits"})
    failed = clone.dvc("repro", "validate")
    assert "data/datasets/hub/dvc.yaml:fetch" in failed.stdout
    clone.git("checkout", "--", "params.yaml")
