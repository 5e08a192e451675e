"""Record experiments in MLflow. DVC decides what runs; this package records the results.

One experiment is one MLflow run. The run is found by a digest of everything that decides the
experiment's outcome (params, data, base model, code, libraries), so all stage processes, including
those of a later `dvc repro`, write to the same run. A stage writes to a journal on the local disk
(`journal`), and a separate process sends the journal to the server (`recorder`, `delivery`). A slow
or broken server therefore does not stop a stage, and no data is lost while the server is
unreachable. A stage also records the reports of earlier stages in `reports/`, because DVC may have
restored them from its cache without starting a process (`stage_results`).

The entry point for a stage is `stage.stage_run`. This file imports nothing.
"""
