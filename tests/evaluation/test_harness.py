"""Harness results of the 8-bit and the tuned model equal a plain forward pass over the rows."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptj8.commands.lm_eval import add_to, table_lines
from gptj8.evaluation import harness
from gptj8.evaluation.harness import (
    load_tasks,
    load_tokenizer,
    measure_tasks,
    run_tasks,
    wrap_model,
)
from gptj8.model.loading import load_adapter, load_model
from gptj8.runtime.errors import UserError

CPU = torch.device("cpu")
ROWS = [
    {"question": "the quick brown", "choices": ["fox", "lazy dog", "jugs"], "answer": 0},
    {"question": "seven wizards box with", "choices": ["five", "a dog", "liquor"], "answer": 1},
    {"question": "the lazy dog", "choices": ["jumps over", "box", "big"], "answer": 2},
    {"question": "over a lazy", "choices": ["dog", "fox", "wizards with"], "answer": 0},
    {"question": "big liquor", "choices": ["jugs", "brown", "seven"], "answer": 1},
    {"question": "five", "choices": ["big", "quick", "over a"], "answer": 2},
]
SHOTS = [{"question": "the lazy", "choices": ["dog", "fox", "box"], "answer": 0}]


def write_task(folder: Path, name: str, **files: Path) -> None:
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {k: str(v) for k, v in files.items()}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    if "train" in files:
        content["fewshot_split"] = "train"
        content["fewshot_config"] = {"sampler": "first_n"}
    (folder / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML


@pytest.fixture(autouse=True)
def own_environment():
    """Restore environment variables, which the command sets in this process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    """Write local tasks, a task whose dataset is missing and a task that needs a download."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, rows in (("test", ROWS), ("train", SHOTS)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    test = folder / "test.jsonl"
    write_task(folder, "zz_plain", test=test)
    write_task(folder, "zz_shots", test=test, train=folder / "train.jsonl")
    write_task(folder, "zz_absent", test=folder / "absent.jsonl")
    generation = {
        "task": "zz_generation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(test)}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "zz_generation.yaml").write_text(json.dumps(generation), encoding="utf-8")
    generation["task"] = "zz_too_long"
    generation["generation_kwargs"]["max_gen_toks"] = 128
    (folder / "zz_too_long.yaml").write_text(json.dumps(generation), encoding="utf-8")
    # a dataset on the Hub
    remote = {"task": "zz_remote", "dataset_path": "owner/name", "output_type": "loglikelihood"}
    (folder / "zz_remote.yaml").write_text(json.dumps(remote), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    """Use a temporary cache for datasets, and raise an error on network connections."""
    import datasets

    def raise_error(*arguments, **options):
        raise AssertionError(f"connects to {arguments}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(socket.socket, "connect", raise_error)
        patch.setattr(socket, "getaddrinfo", raise_error)
        yield


@pytest.fixture
def model(tiny_8bit_dir):
    return load_model(tiny_8bit_dir, torch.float32, CPU)


@pytest.fixture(scope="module")
def tokenizer(tiny_8bit_dir):
    return load_tokenizer(tiny_8bit_dir)


@pytest.fixture(scope="module")
def adapter_dir(tiny_8bit_dir, tmp_path_factory):
    """An adapter that changes the predictions of the model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    base = load_model(tiny_8bit_dir, torch.float32, CPU)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@torch.no_grad()
def likelihood(model, tokenizer, prompt, end):
    """Score one row without padding; softmax over all embedding rows, sum in float64."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + end)["input_ids"]
    scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids)))


def expected(model, tokenizer, before=""):
    """Return the accuracy, and the accuracy by likelihood per character."""
    hits, hits_by_character = [], []
    for row in ROWS:
        scores = np.array(
            [
                likelihood(model, tokenizer, before + row["question"], f" {choice}")
                for choice in row["choices"]
            ]
        )
        hits.append(scores.argmax() == row["answer"])
        lengths = [len(choice) for choice in row["choices"]]
        hits_by_character.append((scores / lengths).argmax() == row["answer"])
    return {"acc": np.mean(hits), "acc_norm": np.mean(hits_by_character)}


def score_pairs(model, tokenizer, pairs, batch_size=2):
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    wrapped = wrap_model(model, tokenizer, batch_size)
    return [score for score, _ in wrapped.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("adapted", [False, True], ids=["8bit", "adapter"])
def test_likelihoods_equal_a_plain_pass(model, tokenizer, adapter_dir, adapted):
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    if adapted:
        model = load_adapter(model, adapter_dir)
    pairs = [(row["question"], f" {choice}") for row in ROWS for choice in row["choices"]]
    plain = [likelihood(model, tokenizer, *pair) for pair in pairs]
    np.testing.assert_allclose(score_pairs(model, tokenizer, pairs), plain, atol=1e-4)
    np.testing.assert_allclose(score_pairs(model, tokenizer, pairs, 16), plain, atol=1e-4)
    assert [likelihood(model, tokenizer, *pair) for pair in pairs] == plain
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    if not adapted:
        after = {name: (id(module), module.training) for name, module in model.named_modules()}
        assert after == before


def test_bfloat16_likelihoods_are_summed_in_float32(tiny_8bit_dir, tokenizer):
    model = load_model(tiny_8bit_dir, torch.bfloat16, CPU)
    pairs = [(row["question"], f" {choice}") for row in ROWS for choice in row["choices"]]
    plain = [likelihood(model, tokenizer, *pair) for pair in pairs]
    # A softmax in bfloat16 has an error of 0.02 per token.
    np.testing.assert_allclose(score_pairs(model, tokenizer, pairs, 1), plain, atol=2e-3)


@pytest.mark.slow
def test_task_metrics_equal_the_manual_calculation(model, tokenizer, adapter_dir, task_dir):
    tasks = load_tasks(["zz_plain", "zz_shots"], task_dir)
    measured = measure_tasks(model, tokenizer, tasks, batch_size=4)
    for name, value in expected(model, tokenizer).items():
        assert measured[f"zz_plain/{name}"] == pytest.approx(value)
        error = math.sqrt(value * (1 - value) / (len(ROWS) - 1))
        assert measured[f"zz_plain/{name}_stderr"] == pytest.approx(error)
    assert measured["zz_plain/samples"] == len(ROWS)
    assert all(re.fullmatch(r"[\w./-]+", name) for name in measured)
    assert all(type(value) is float for value in measured.values())

    tuned = load_adapter(model, adapter_dir)
    again = measure_tasks(tuned, tokenizer, tasks, batch_size=4)
    assert again["zz_plain/acc"] == pytest.approx(expected(tuned, tokenizer)["acc"])
    with tuned.disable_adapter():
        assert measure_tasks(tuned, tokenizer, tasks, batch_size=4) == measured


def test_few_shot_examples_precede_the_prompt(model, tokenizer, task_dir):
    measured = run_tasks(
        model, tokenizer, ["zz_shots"], batch_size=4, num_fewshot=1, include_path=task_dir, seed=5
    )
    values = expected(model, tokenizer, before="the lazy dog\n\n")
    assert measured["zz_shots/acc"] == pytest.approx(values["acc"])
    assert measured["zz_shots/acc_norm"] == pytest.approx(values["acc_norm"])


@pytest.mark.parametrize("limit", [1, 2])
def test_limit_uses_the_first_rows(model, tokenizer, task_dir, limit):
    tasks = load_tasks(["zz_pl*"], task_dir)
    measured = measure_tasks(model, tokenizer, tasks, batch_size=4, limit=limit)
    assert measured["zz_plain/samples"] == limit
    assert ("zz_plain/acc_stderr" in measured) == (limit > 1)


def test_generation_task(model, tokenizer, task_dir):
    tasks = load_tasks(["zz_generation"], task_dir)
    measured = measure_tasks(model, tokenizer, tasks, batch_size=4)
    assert 0 <= measured["zz_generation/exact_match"] <= 1


def test_task_longer_than_the_context_raises(model, tokenizer, task_dir):
    with pytest.raises(UserError, match="does not fit into the model's context of 128 tokens"):
        measure_tasks(model, tokenizer, load_tasks(["zz_too_long"], task_dir), batch_size=4)


def test_truncated_prompts_are_counted(model, tokenizer, task_dir):
    wrapped = wrap_model(model, tokenizer, 2)
    long = list(range(1, 140))
    wrapped._loglikelihood_tokens([(None, long, [5]), (None, long[:128], [5])], disable_tqdm=True)
    assert (wrapped.requested, wrapped.truncated) == (2, 1)


def test_nan_likelihoods_raise(model, tokenizer, task_dir):
    model.lm_head.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        measure_tasks(model, tokenizer, load_tasks(["zz_plain"], task_dir), batch_size=4)


def test_unknown_tasks_are_listed_with_suggestions(task_dir):
    with pytest.raises(UserError) as caught:
        load_tasks(["zz_plane", "zz_plain", "helaswag"], task_dir)
    first, second = str(caught.value).splitlines()
    assert "no task zz_plane, did you mean zz_plain?" in first
    assert "no task helaswag, did you mean hellaswag?" in second


def test_unavailable_datasets_raise(task_dir, monkeypatch):
    with pytest.raises(UserError, match=r"task zz_absent cannot be loaded: .*absent\.jsonl"):
        load_tasks(["zz_absent"], task_dir)

    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="zz_remote: the dataset could not be downloaded") as error:
        load_tasks(["zz_remote"], task_dir)
    assert len(str(error.value).splitlines()) == 1


def test_invalid_arguments_raise(model, tokenizer, task_dir, tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        load_tasks(["zz_plain"], tmp_path / "none")
    with pytest.raises(UserError, match="no tasks to run"):
        load_tasks([], task_dir)
    with pytest.raises(UserError) as caught:
        measure_tasks(model, tokenizer, [], batch_size=0, limit=0, num_fewshot=-1)
    assert len(str(caught.value).splitlines()) == 3


def test_missing_harness_raises(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'gptj8\[harness\]'"):
        run_tasks(model, tokenizer, ["zz_plain"], batch_size=1)


def test_metric_names_are_valid_in_mlflow():
    results = {
        "results": {
            "group::task one": {
                "alias": "x",
                "acc,none": np.float64(0.5),
                "acc_stderr,none": "N/A",
                "exact_match,strict-match": 0.25,
                "exact_match_stderr,strict-match": 0.125,
                "f1,none": float("nan"),
            }
        },
        "n-samples": {"group::task one": {"original": 9, "effective": 4}},
    }
    metrics = harness._flatten(results)
    assert metrics == {
        "group__task_one/acc": 0.5,
        "group__task_one/exact_match.strict-match": 0.25,
        "group__task_one/exact_match_stderr.strict-match": 0.125,
        "group__task_one/samples": 4.0,
    }
    assert table_lines({"quantized": metrics, "tuned": {"group__task_one/acc": 1.0}}) == [
        "  task             metric                    quantized        tuned",
        "  group__task_one  acc                       0.5000           1.0000",
        "  group__task_one  exact_match.strict-match  0.2500 ± 0.1250",
    ]


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers())
    parsed = parser.parse_args(["lm-eval", *map(str, arguments)])
    parsed.command(parsed)


def test_command(tiny_8bit_dir, adapter_dir, task_dir, tokenizer, tmp_path, capfd):
    output = tmp_path / "reports" / "metrics.json"
    command(
        "--tasks", "zz_plain", "--model", tiny_8bit_dir, "--adapter", adapter_dir,
        "--dtype", "float32", "--include-path", task_dir, "--output", output,
    )  # fmt: skip
    written = json.loads(output.read_text(encoding="utf-8"))
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    assert written["quantized/zz_plain/acc"] == pytest.approx(expected(model, tokenizer)["acc"])
    tuned = load_adapter(model, adapter_dir)
    assert written["tuned/zz_plain/acc"] == pytest.approx(expected(tuned, tokenizer)["acc"])
    printed, progress = capfd.readouterr()
    lines = printed.splitlines()
    assert lines[0].split() == ["task", "metric", "quantized", "tuned"]
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["zz_plain", "acc"],
        ["zz_plain", "acc_norm"],
    ]
    assert lines[-1].endswith(str(output)) and len(lines) == 5
    assert "Running loglikelihood requests" in progress
    assert "WARNING" not in progress and "pretrained" not in progress


def test_command_on_the_original_model(tiny_model_dir, task_dir, tmp_path, capsys):
    output = tmp_path / "metrics.json"
    command(
        "--tasks", "zz_plain", "--model", tiny_model_dir, "--limit", 2,
        "--include-path", task_dir, "--output", output,
    )  # fmt: skip
    assert json.loads(output.read_text(encoding="utf-8"))["base/zz_plain/samples"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "absent"], "absent does not exist"),
        (["--adapter", "absent"], "absent has no adapter_config.json"),
        (["--batch-size", "0"], "batch size = 0"),
        (["--limit", "-1"], "limit = -1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_checks_arguments_before_loading_a_model(tiny_8bit_dir, tmp_path, options, message):
    output = tmp_path / "metrics.json"
    with pytest.raises(UserError, match=message):
        command("--tasks", "x", "--model", tiny_8bit_dir, "--output", output, *options)
    assert not output.exists()
