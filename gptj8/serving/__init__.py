"""Serve a fine-tuned model over HTTP, in MLflow and on the command line.

Modules from low to high level: `task` (the task of an export), `predictor` (a model and its prompt
format), `engine` (one thread that owns the model and batches requests), `requests` and
`openai_requests`, `openai_responses` (schemas), `problems` (responses to requests that fail),
`stop_strings`, `answers` (from the engine's thread to the event loop), `meters` (Prometheus),
`guards` (limits, the token, connections), `openai_api` (routes), `openapi` (the API's description),
`app` (FastAPI, with `page.html`), `sockets` (listening sockets), `mlflow_model` (loaded by
`mlflow models serve`), `registry` (registers exports in MLflow).
No module reads params.yaml, because an export contains the params of its task.
"""
