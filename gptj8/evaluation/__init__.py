"""Evidence about a model: perplexity, accuracy by label likelihood, intervals, a baseline.

Low to high: `batching` (rows to padded tensors), `perplexity` and `likelihood` (a model's scores),
`statistics`, `metrics` and `baseline` (numbers from scores), `few_shot` (solved examples), `report`
(files), `suite` (the same measurements on every model compared). Nothing here reads params.yaml.
"""
