"""The description of the API is true: Schemathesis makes requests from it and checks responses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from gptj8.runtime.manifest import write_manifest
from gptj8.serving.guards import Limits
from gptj8.serving.predictor import Predictor
from tests.helpers.served_models import LABELS, running

TOKEN = "open-sesame"
EXAMPLES = 200


@pytest.fixture(scope="module")
def chatting_classifier(exports, chat_model, tmp_path_factory):
    """Return a predictor that can do everything that the API offers, with room for any prompt."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(chat_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 16384}))
    write_manifest(folder)
    return Predictor.load(folder, exports["columns"], "float32")


def described(predictor, **settings):
    with running(predictor, **settings) as (url, _):
        return requests.get(f"{url}/openapi.json", timeout=10).json()


def test_only_what_the_model_can_do_is_described(predictors, chatting_classifier):
    whole = described(chatting_classifier)["paths"]
    base = described(predictors["base"])["paths"]
    assert set(whole) - set(base) == {"/classify", "/v1/chat/completions"}
    assert "get" in base["/health"] and "head" in base["/health"]


def test_rows_and_models_have_their_names(chatting_classifier):
    schemas = described(chatting_classifier, limits=Limits(max_new_tokens=9))["components"][
        "schemas"
    ]
    row = schemas["ClassifyRequest"]["properties"]["row"]
    assert set(row["properties"]) == {"title", "body", "label"}
    assert (row["required"], row["additionalProperties"]) == (["title"], False)
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["gptj8"]
    assert schemas["ChatRequest"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 9
    token = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"][2]["items"]
    assert token["maximum"] == chatting_classifier.encoder.vocab_size - 1
    for kind in schemas["GenerateRequest"]["anyOf"]:
        assert kind["properties"]["max_new_tokens"]["maximum"] == 9


def test_failures_have_the_bodies_that_are_sent(chatting_classifier):
    found = described(chatting_classifier, token=TOKEN)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', str(found).replace("'", '"')))
    assert references <= set(found["components"]["schemas"])
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            expected = "ProblemResponse" if path.startswith("/v1/") else "DetailResponse"
            failures = {s: r for s, r in operation["responses"].items() if s != "200"}
            assert "422" not in failures or not path.startswith("/v1/")
            for response in failures.values():
                if method != "head":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": f"#/components/schemas/{expected}"}
            is_public = path in ("/", "/health")
            assert ("401" in failures) != is_public
            assert ("security" in operation) != is_public
    names = [op["operationId"] for ms in found["paths"].values() for op in ms.values()]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_schemathesis_finds_nothing(chatting_classifier, tmp_path):
    command = [Path(sys.executable).with_name("schemathesis"), "run", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--checks", "all"]
    command += ["--continue-on-failure", "--max-examples", EXAMPLES]
    command += ["--header", f"Authorization: Bearer {TOKEN}"]
    limits = Limits(max_new_tokens=8)
    # Requests have up to 256 answers, so a large batch is faster.
    with running(chatting_classifier, limits, TOKEN, max_batch=64) as (url, _):
        done = subprocess.run(
            [*map(str, command), f"{url}/openapi.json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        answer = requests.post(
            f"{url}/classify",
            json={"row": {"title": "fox"}},
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
        )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"Operations: +11 selected / 11 total", done.stdout)
    assert set(answer.json()["scores"]) == set(LABELS)  # it still works
