"""MLflow's record of the experiments. DVC decides what runs; this tells what it brought.

One experiment is one MLflow run, found again by the digest of everything that decides its outcome
(params, data, base model), so every stage process, now or in a later `dvc repro`, writes to the
same row. A stage writes to a journal on this disk (`journal`), which a process beside it sends
(`recorder`, `delivery`): recording neither stops nor slows the work, and nothing of it is lost
while a server is away. A stage also records what the stages before it left in `reports/`, because
DVC may have taken those from its cache without starting a process (`evidence`).
"""

from gptj8.tracking.comparison import log_comparison
from gptj8.tracking.evidence import REPORTS, STAGES
from gptj8.tracking.identity import tracking_uri
from gptj8.tracking.journal import flatten
from gptj8.tracking.stage import StageRun, stage_run

__all__ = [
    "REPORTS",
    "STAGES",
    "StageRun",
    "flatten",
    "log_comparison",
    "stage_run",
    "tracking_uri",
]
