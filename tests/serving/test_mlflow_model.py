"""A registered model version can be loaded anywhere and answers like the exported model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests

from gptj8.runtime.errors import UserError
from gptj8.serving.mlflow_model import Model
from gptj8.serving.registry import register_export
from tests.helpers.served_models import LABELS, until
from tests.helpers.servers import free_port

TEXTS = ["the quick brown fox", "seven wizards <|endoftext|>", "lazy dog " * 60]

LOAD = """
import json, sys
import mlflow, pandas as pd
answers = []
for name, rows, params in json.loads(sys.argv[1]):
    model = mlflow.pyfunc.load_model(f"models:/{name}/1")
    answers.append(model.predict(pd.DataFrame(rows), params=params).to_dict("list"))
import gptj8
print(json.dumps([gptj8.__file__, *answers]))
"""


@pytest.fixture(scope="module")
def store(exports, tiny_8bit_dir, tmp_path_factory):
    """A store with version 1 of a classifier and of a model that writes completions."""
    import mlflow

    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("tests", artifact_location=(folder / "a").as_uri())
    for task, name in (("classification", "classifier"), ("instructions", "writer")):
        run = client.create_run(experiment)
        mlflow_run = (client, run.info.run_id)
        arguments = (lambda found=mlflow_run: found, name, tiny_8bit_dir, exports[task])
        measured = {"evaluate": {"tuned/accuracy": 0.5}}
        assert str(register_export(*arguments, measured, "champion")) == "1"
        assert str(register_export(*arguments, {})) == "1"  # an identical export is registered once
    return uri


def environment(store):
    """Return an environment without this checkout, so that the registered code is used."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # MLflow finds `uvicorn` through PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "MLFLOW_TRACKING_URI": store, "PATH": path}


@pytest.mark.slow
def test_registered_models_work_in_a_new_process(store, predictors, tmp_path):
    rows = [{"instruction": "jump"}, {"instruction": "box", "input": "the dog"}]
    asked = [["classifier", {"text": TEXTS}, None], ["writer", rows, {"max_new_tokens": 9}]]
    process = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(asked)],
        cwd=tmp_path,
        env=environment(store),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    code, classified, written = json.loads(process.stdout.splitlines()[-1])
    assert "/code/" in code
    predictor = predictors["classification"]
    prompts = [predictor.encode_for_labels({"text": text}).ids for text in TEXTS]
    expected = predictor.classify(prompts)
    assert list(classified) == ["label", *(f"score_{label}" for label in LABELS)]
    found = np.array([classified[f"score_{label}"] for label in LABELS]).T
    assert np.allclose(found, expected, atol=0.02)  # the device determines the dtype
    assert classified["label"] == [LABELS[row.argmax()] for row in found]
    assert list(written) == ["completion"]
    assert len(written["completion"]) == 2


def test_completion_model_answers_rows_independently(predictors):
    predictor = predictors["instructions"]
    rows = pd.DataFrame({"instruction": ["jump", "box"], "input": [np.nan, "the dog"]})
    found = Model(predictor).predict(rows, {"max_new_tokens": 9})
    for number, row in enumerate(
        ({"instruction": "jump"}, {"instruction": "box", "input": "the dog"})
    ):
        (alone,) = Model(predictor).predict(pd.DataFrame([row]), {"max_new_tokens": 9})[
            "completion"
        ]
        assert found["completion"][number] == alone
    assert found["completion"].nunique() == 2


@pytest.mark.parametrize("tokens", [0, -5])
def test_max_new_tokens_below_1_raises(predictors, tokens):
    rows = pd.DataFrame({"instruction": ["jump"]})
    with pytest.raises(UserError, match=f"max_new_tokens = {tokens} must be at least 1"):
        Model(predictors["instructions"]).predict(rows, {"max_new_tokens": tokens})


def test_invalid_row_is_named_in_error(predictors):
    rows = pd.DataFrame({"text": ["a", None]})
    with pytest.raises(UserError, match="row 1: text is empty"):
        Model(predictors["classification"]).predict(rows)


@pytest.mark.parametrize("task", ["classification", "instructions"])
def test_empty_table_gives_no_answers(predictors, task):
    columns = list(predictors[task].task.columns)
    assert len(Model(predictors[task]).predict(pd.DataFrame(columns=columns))) == 0


def test_version_is_a_logged_model_of_its_run(store):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=store, registry_uri=store)
    version = client.get_model_version_by_alias("classifier", "champion")
    (output,) = client.get_run(version.run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.source_run_id == version.run_id
    registered = json.loads(model.tags["mlflow.modelVersions"])  # links the two pages
    assert registered == [{"name": "classifier", "version": version.version}]
    assert version.source == model.artifact_location
    assert model.status == "READY"


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["models:/classifier/1", "models:/classifier@champion"])
def test_mlflow_models_serve(store, tmp_path, uri):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri]
    command += ["--env-manager", "local", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(store),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(url + "/ping", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    try:
        until(answers, 90)
        body = {"dataframe_split": {"columns": ["text"], "data": [[text] for text in TEXTS]}}
        answer = requests.post(url + "/invocations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        predictions = answer.json()["predictions"]
        assert [p["label"] in LABELS for p in predictions] == [True] * 3
        assert sum(predictions[0][f"score_{label}"] for label in LABELS) == pytest.approx(1)
        body = {"dataframe_records": [{"words": "fox"}]}
        assert requests.post(url + "/invocations", json=body, timeout=60).status_code == 400
        body = {"dataframe_records": [{"text": " "}]}
        answer = requests.post(url + "/invocations", json=body, timeout=60)
        assert answer.status_code == 400
        assert "row 0: text is empty" in answer.text
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # only this server's session
        process.wait(20)
