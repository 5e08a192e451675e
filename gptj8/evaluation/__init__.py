"""Evaluate models: perplexity, accuracy, calibration, confidence intervals and the export gate.

From low to high level: `systems` (names of the compared systems), `statistics`, `calibration`,
`baseline` (TF-IDF), `other_systems` (predictions from CSV files), `metrics` (all metrics by name),
`few_shot` (solved examples), `report` and `plots` (files), `suite` (the same measurements on every
model), `run` (the stage), `gate` (requirements for the export) and `harness` (standard benchmarks).
No module here reads params.yaml.
"""
