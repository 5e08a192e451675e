"""A conversation has the same prompt in training, on the command line, served and merged."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import requests
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from gptj8.dataset.prepared.dataset import load_prepared
from gptj8.dataset.prepared.examples import learned_spans, prompt_ids
from gptj8.serving.predictor import Predictor
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.project_clone import ANIMALS, MAGIC, STAGES, Clone, ran
from tests.helpers.served_models import running
from tests.helpers.tokenizer_families import write_family

pytestmark = pytest.mark.slow

SYSTEM = "Be brief."


def conversations(count):
    rng = random.Random(0)
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            words = " ".join(rng.choices(ANIMALS, k=6))
            messages.append({"role": "user", "content": f" {words}?\n"})
            messages.append({"role": "assistant", "content": f"{rng.choice(MAGIC)}."})
        yield {"messages": messages, "system": SYSTEM}


@pytest.fixture(scope="module", params=["own", "file", "plain"])
def clone(request, tmp_path_factory):
    """A clone whose model has a chat template, gets one from a file, or has none."""
    folder = tmp_path_factory.mktemp("conversations")
    family, source, _, _ = TEMPLATES["smollm2"]
    model = write_family(family, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    if request.param == "own":
        (model / "chat_template.jinja").write_text(source)
    made = Clone(folder / "project", model)
    lines = map(json.dumps, conversations(60))
    (made.folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    (made.folder / "data" / "chat_templates" / "mine.jinja").write_text(source)
    template = {"own": "auto", "file": "data/chat_templates/mine.jinja", "plain": None}
    made.edit_params(
        data={
            "train": "chats.jsonl",
            "task": "completion",
            "prompt_template": "{messages}\nassistant:",
            "chat_template": template[request.param],
            "max_length": 160,
            "near_duplicate_threshold": None,
        },
        evaluate={"max_new_tokens": 8},
        export={"merge": True},
    )
    return made


def test_prompts_are_the_same_everywhere(clone, monkeypatch):
    done = clone.dvc("repro")
    assert ran(done) == list(STAGES), done.stdout + done.stderr
    artifacts = clone.folder / "artifacts"
    dataset = load_prepared(artifacts / "dataset")
    rows, examples = dataset.split("train"), dataset.examples("train")
    export = artifacts / "export"
    tokenizer = AutoTokenizer.from_pretrained(export / "merged")
    # In float32, no answer of the two processes is a tie that rounding decides.
    predictor = Predictor.load(artifacts / "base-8bit", export, "float32")
    assert len(rows) == len(examples)
    learned = 0
    for example in examples:
        cells = json.loads(rows["conversation"][example["source_row"]])
        asked = {"messages": cells["messages"][:-1]}
        expected = tokenizer.apply_chat_template(
            asked["messages"], add_generation_prompt=True, return_dict=False
        )
        assert prompt_ids(example) == expected
        assert predictor.encode_row(asked).ids == expected
        learned += sum(span.stop - span.start for span in learned_spans(example))
        for span in learned_spans(example):  # an answer, and the token that ends it
            end = tokenizer.decode(example["input_ids"][span.stop - 1])
            assert end == "<|im_end|>"
    metrics = clone.metrics("finetune")
    assert metrics["learned_tokens"] == learned
    assert metrics["tokens"] == sum(len(example["input_ids"]) for example in examples)
    # The server, and the command in a process of its own.
    with running(predictor) as (address, _):
        body = {"row": asked, "max_new_tokens": 8}
        answer = requests.post(f"{address}/generate", json=body, timeout=60).json()
    assert answer["prompt_tokens"] == len(expected)
    command = [sys.executable, "-m", "gptj8.commands.main", "generate", "--max-new-tokens", "8"]
    command += ["--row", f"messages={json.dumps(asked['messages'])}"]
    command += ["--model", str(artifacts / "base-8bit"), "--adapter", str(export)]
    command += ["--dtype", "float32"]
    said = subprocess.run(command, cwd=clone.folder, capture_output=True, text=True)
    assert said.stdout == answer["completion"] + "\n", said.stderr
    # The merged model ends its answers with the token that was learned.
    ends = GenerationConfig.from_pretrained(export / "merged").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
