"""Evidence about a model: perplexity, accuracy in three kinds, calibration, intervals, a gate.

Low to high: `systems` (what is compared, by name), `batching` (rows to padded tensors),
`perplexity` and `likelihood` (a model's scores), `answers` (what it writes), `statistics`,
`calibration`, `baseline` and `outside` (numbers and predictions of others), `metrics` (all numbers
by name), `few_shot` (solved examples), `report` and `plots` (files), `suite` (the same measurements
on every model compared), `requirements` (what they have to meet). Nothing here reads params.yaml.
"""
