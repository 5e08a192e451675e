"""A tuned model that answers: over HTTP, in MLflow, at the terminal.

Low to high: `task` (what an export was tuned for), `predictor` (a model and how it is asked),
`engine` (one thread that owns it and shares its steps among requests), `requests` (what may be
asked), `app` (FastAPI), `sockets` (where it listens), `commands` (the terminal), `mlflow_model`
(what `mlflow models serve` loads).
Nothing here reads params.yaml: what a model was tuned for is in its export.
"""
