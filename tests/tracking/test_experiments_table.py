"""`gptj8 experiments`: the table of what differs, from DVC's own CSV."""

from __future__ import annotations

import subprocess

import pytest

from gptj8.tracking import experiments_table
from gptj8.tracking.experiments_table import experiments_table as table_of

SHOWN = """\
Experiment,rev,typ,Created,parent,State,tuned/accuracy,finetune.r,finetune.learning_rate,seed
,workspace,baseline,,,Success,0.5,8,0.002,0
,trunk,baseline,,,Success,0.5,8,0.002,0
brave-fox,1111111,branch_commit,,,Success,0.75,4,0.001,0
"""


@pytest.fixture
def shown(monkeypatch):
    """Answer as `dvc exp show --csv` does."""

    def run(command, **_):
        assert command[-4:] == ["dvc", "exp", "show", "--csv"]
        return subprocess.CompletedProcess(command, 0, SHOWN, "")

    monkeypatch.setattr(experiments_table.subprocess, "run", run)


def test_every_param_that_differs_is_a_column(shown):
    header, *_, last = table_of().splitlines()
    assert "finetune.r" in header
    assert "finetune.learning_rate" in header  # it differs where r does
    assert "seed" not in header
    assert last.split()[0] == "brave-fox" and "0.001" in last and "0.75" in last
