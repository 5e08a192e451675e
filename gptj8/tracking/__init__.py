"""MLflow's record of the experiments. DVC decides what runs; this tells what it brought.

One experiment is one MLflow run, found again by the digest of everything that decides its outcome
(params, data, base model), so every stage process, now or in a later `dvc repro`, writes to the
same row. A stage writes to a journal on this disk (`journal`), which a process beside it sends
(`recorder`, `delivery`): recording neither stops nor slows the work, and nothing of it is lost
while a server is away. A stage also records what the stages before it left in `reports/`, because
DVC may have taken those from its cache without starting a process (`stage_results`).

`stage.stage_run` is where a stage begins. This file imports nothing.
"""
