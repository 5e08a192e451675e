"""Exports of small models for each task, and a server on the loopback interface."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import uvicorn

from gptj8.export.bundle import collect, describe
from gptj8.export.reference_answers import save_reference
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.generation.batch import generate_greedily
from gptj8.model.loading import load_model
from gptj8.params.sections import parse_params, resolved
from gptj8.serving.app import Access, create_app
from gptj8.serving.engine import Engine
from gptj8.serving.guards import Limits, Server
from gptj8.serving.predictor import Predictor
from tests.helpers.servers import free_port

LABELS = ["fox", "foxes and dogs", "liquor"]

TASKS = {
    "classification": {"prompt_template": "{text}\n\nLabel:"},
    "columns": {
        "prompt_template": "Title: {title}\nBody: {body}\nIs it a fox?",
        "optional_columns": ["body"],
    },
    "instructions": {
        "task": "completion",
        "prompt_template": "Do: {instruction}\nWith: {input}\nDone:",
        "completion_column": "output",
    },
    "messages": {
        "task": "completion",
        "prompt_template": "{messages}\nassistant:",
        "messages_column": "chat",
    },
}

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + '\\n' }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def data_of(task):
    return {"train": "rows.csv", "max_length": 96, **TASKS[task]}


@pytest.fixture(scope="session")
def adapter(tiny_8bit_dir, tmp_path_factory):
    """Return an adapter as `finetune` writes it, with weights large enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = load_model(tiny_8bit_dir, torch.float32, torch.device("cpu"))
    model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    save_reference(folder, model, [[5, 6]], [0])
    return folder


@pytest.fixture(scope="session")
def exports(adapter, tiny_8bit_dir, tmp_path_factory):
    """Return the folders written by the stage `export`, by task."""
    folders = {}
    for task in TASKS:
        folders[task] = tmp_path_factory.mktemp(f"export-{task}")
        params = parse_params({"data": data_of(task), "model": {"path": "models/tiny"}})
        labels = LABELS if params.data.task == "classification" else []
        dataset = {
            "labels": labels,
            "rows": {"train": 3, "validation": 1, "test": 1},
            "files": [{"path": "rows.csv", "md5": "0" * 32}],
            "prepared": "0.dir",
        }
        collect(adapter, tiny_8bit_dir, folders[task], tiny_8bit_dir)
        describe(folders[task], resolved(params), {}, dataset)
    return folders


@pytest.fixture(scope="session")
def predictors(exports, tiny_8bit_dir):
    """Return the predictors by task; `base` is the model without an adapter."""
    found = {t: Predictor.load(tiny_8bit_dir, folder, "float32") for t, folder in exports.items()}
    return {**found, "base": Predictor.load(tiny_8bit_dir, None, "float32")}


@pytest.fixture(scope="session")
def chat_model(tiny_8bit_dir, tmp_path_factory):
    """Return the base model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_8bit_dir, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def greedy(predictor, prompt, tokens):
    """Return the ids that greedy decoding of a single prompt gives."""
    encoder = predictor.encoder
    (ids,) = generate_greedily(
        predictor.model,
        [prompt],
        max_new_tokens=tokens,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
    )
    return ids


@contextmanager
def running(predictor, limits=Limits(), token=None, origins=(), **settings):  # noqa: B008  # frozen
    """Yield the URL and the engine of a server that runs in its own thread.

    `settings` are those of the engine, which batches up to 4 rows by default.
    """
    engine = Engine(predictor, **{"max_batch": 4, **settings})
    port = free_port()
    app = create_app(engine, limits, Access(token, origins))
    config = uvicorn.Config(app, port=port, log_level="error")
    server = Server(config, engine, limits)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds=20.0):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)


@contextmanager
def held(engine, monkeypatch):
    """Block the engine before its next step, so that new requests stay active or waiting."""
    gate = threading.Event()
    step = engine._batch.step

    def waiting_step():
        if engine._batch.rows:
            gate.wait(30)
        return step()

    monkeypatch.setattr(engine._batch, "step", waiting_step)
    try:
        yield gate
    finally:
        gate.set()
        monkeypatch.undo()
