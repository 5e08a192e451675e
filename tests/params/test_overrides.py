"""Overrides from the command line pass the same checks as params.yaml itself."""

from __future__ import annotations

import shutil

import pytest

from gptj8.params.overrides import overridden_params
from gptj8.runtime.errors import UserError
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_values_are_changed_and_the_file_is_not(tmp_path):
    before = (tmp_path / "params.yaml").read_text()
    params = overridden_params(["finetune.r=4", "data.train=mine.csv"])
    assert (params.finetune.r, params.data.train) == (4, "mine.csv")
    assert (tmp_path / "params.yaml").read_text() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("data.train=/data/x.csv", "data.train = '/data/x.csv' is outside the project"),
        ("data.train=../x.csv", "data.train = '../x.csv' is outside the project"),
        ("data.test=null", "data.test is null, which DVC cannot resolve"),
        ("finetune.r=0", "finetune.r = 0: input should be greater"),
        ("finetune.rank=4", "finetune.rank is not a known key"),
        ("finetune.r", "write key=value"),
    ],
)
def test_a_stage_would_reject_it_too(change, reason):
    with pytest.raises(UserError) as caught:
        overridden_params([change])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
