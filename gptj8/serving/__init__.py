"""Serve a fine-tuned model over HTTP, in MLflow and on the command line.

Modules from low to high level: `task` (the task of an export), `predictor` (a model and its prompt
format), `engine` (one thread that owns the model and batches requests), `requests` (request and
response schemas), `app` (FastAPI), `sockets` (listening sockets), `mlflow_model` (loaded by
`mlflow models serve`), `registry` (registers exports in MLflow).
No module reads params.yaml, because an export contains the params of its task.
"""
