"""Test that memory estimates match the bytes of loaded models and the allocations of real steps."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

import gptj8
from benchmarks import memory as benchmark
from gptj8.commands import main
from gptj8.commands.estimate import parse_bytes
from gptj8.dataset.prepared.examples import lengths_of
from gptj8.kernels import cpu, dispatch, operators
from gptj8.memory import estimate as estimating
from gptj8.memory import measured_speed, process_memory
from gptj8.memory.estimate import Estimator, Plan, plan_of
from gptj8.memory.fitting import choose_fit
from gptj8.memory.skeleton import build, optimizer_bytes, read_config, weigh
from gptj8.memory.trace import Batch, _inside, _loss, _Recorder, trace_training_step
from gptj8.memory.training_memory import TrainingMemory
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import load_model
from gptj8.params.sections import load_params, parse_params
from gptj8.quantization.codec import quantize_blockwise
from gptj8.runtime import machine, process
from gptj8.runtime.errors import UserError
from gptj8.training.activation_checkpointing import KINDS, set_checkpointing
from gptj8.training.fit import Fit, confirm, divisors, longest_of
from gptj8.training.loop import train, try_step
from gptj8.training.settings import TrainingSettings
from tests.helpers.architectures import ARCHITECTURES, COMMON
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
QUANTIZATION = gptj8.Blockwise8bitConfig(block_size=256)
MINIMAL = {"data": {"train": "x"}, "model": {"path": "y"}}


def plan(config, *, length=32, layers=None, method="lora", target="all-linear", **changes):
    config = read_config(config) if isinstance(config, str | Path) else config
    shape = AdapterSpec(method, target, 4, 8.0, 0.0)
    return Plan(config, QUANTIZATION, shape, torch.float32, "cpu", length, length - 1, **changes)


def gptj(**changes):
    sizes = {"vocab_size": 400, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return transformers.GPTJConfig(**{**sizes, "rotary_dim": 8, **changes})


def only_config(folder, config):
    folder.mkdir()
    config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


@pytest.mark.parametrize(
    ("method", "target"), [("lora", "all-linear"), ("lora", "attention"), ("layernorm", "-")]
)
def test_counts_match_the_loaded_model(tiny_8bit_dir, tmp_path, method, target):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(tiny_8bit_dir / "config.json", folder)
    loaded = load_model(tiny_8bit_dir, torch.float32, CPU)
    loaded = add_adapter(loaded, AdapterSpec(method, target, 4, 8, 0.0))
    shape = AdapterSpec(method, target, 4, 8.0, 0.0)
    counted = build(read_config(folder), gptj8.Blockwise8bitConfig(), torch.float32, shape)
    assert weigh(counted) == weigh(loaded)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch"])
def test_optimizer_state_is_counted_exactly(optim):
    import bitsandbytes

    weights = [torch.nn.Parameter(torch.randn(n)) for n in (8, 4095, 4096, 10_000)]
    kind = {"adamw_bnb_8bit": bitsandbytes.optim.AdamW8bit, "adamw_torch": torch.optim.AdamW}
    optimizer = kind[optim](weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for weight in weights:
        state = optimizer.state[weight]
        tensors = [
            value
            for name, value in state.items()
            if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in name
        ]
        assert sum(t.numel() * t.element_size() for t in tensors) == optimizer_bytes(
            weight.numel(), optim
        )


FAST = ("gptj", "llama")  # the others take a minute in total


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith(FAST) else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_architectures_are_estimated_from_only_the_config(name, tmp_path):
    kind, sizes = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**sizes, **COMMON)
    folder = only_config(tmp_path / "alone", config)
    found = Estimator(plan(folder))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "model", quantization_config=QUANTIZATION)
    assert found.weights == weigh(add_adapter(loaded, AdapterSpec(r=4, lora_alpha=8)))
    assert found.training(2).total > found.training(1).total > found.weights.base
    assert found.evaluation().total > found.weights.base


@pytest.mark.parametrize("checkpointing", KINDS["cuda"])
def test_recorded_step_allocates_as_much_as_a_real_step(tiny_8bit_dir, checkpointing):
    # Short rows, because with fake tensors transformers makes a causal mask that a real step skips.
    batch = Batch(6, 10, 9, padded=False)
    shape = AdapterSpec(r=4, lora_alpha=8.0)
    config = read_config(tiny_8bit_dir)
    recorded = trace_training_step(
        build(config, QUANTIZATION, torch.float32, shape), batch, checkpointing
    )
    model = load_model(tiny_8bit_dir, torch.float32, CPU)
    model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8)).train()
    model.config.use_cache = False
    set_checkpointing(model, checkpointing)
    recorder = _Recorder()
    recorder.leave_out(model)
    with recorder:
        loss = _loss(model, batch, recorder)
        recorder.enter("backward", "backward")
        loss.backward()
    real = recorder.result()
    for phase, peak in recorded.peaks.items():
        assert sum(peak.values()) == pytest.approx(sum(real.peaks[phase].values()), rel=0.02), phase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporary_memory_of_a_gradient_in_pieces(monkeypatch, dtype):
    """On a CPU without units for 16 bits, as a real computation allocates it."""
    monkeypatch.setattr(cpu, "native_dtypes", lambda: (torch.float32,))
    monkeypatch.setattr(dispatch, "most_rows", lambda *_: 0)
    monkeypatch.setattr(operators, "_PIECE", 16 * 256)
    monkeypatch.setattr(operators, "_CACHED_PIECE", 16 * 256)
    q = quantize_blockwise(torch.randn(1024, 256), 64)
    grad = torch.randn(128, 1024).to(dtype)
    arguments = (grad, q.codes, q.absmax, q.codebook, 64, False)
    output = operators.frozen_linear_backward(*arguments)  # also allocates the reused buffer
    recorder = _Recorder()
    given = (grad, q.codes, q.absmax, q.codebook, dispatch._scratch.buffer)
    recorder._numbers = {tensor.untyped_storage()._cdata: 0 for tensor in given}
    with recorder:
        operators.frozen_linear_backward(*arguments)
    allocated = sum(recorder.result().peaks["forward"].values())
    inside, _ = _inside("gptj8::frozen_linear_backward", arguments, output)
    assert allocated <= 1.02 * (inside + output.nbytes)
    assert inside <= 1.35 * allocated


def test_estimating_does_not_change_random_numbers(tmp_path):
    found = Estimator(plan(gptj()))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found.training(2)
    process_memory.measure_process_memory("float32")
    assert torch.equal(torch.rand(4), expected)


def test_larger_settings_need_more_memory():
    def total(rows=2, **changes):
        length = changes.pop("length", 64)
        checkpointing = changes.pop("checkpointing", "full")
        config = gptj(**changes)
        return Estimator(plan(config, length=length, checkpointing=checkpointing)).training(rows)

    least = total().total
    for changes in (
        {"rows": 4},
        {"length": 128},
        {"n_layer": 4},
        {"n_embd": 128},
        {"checkpointing": "selective"},
        {"checkpointing": "none"},
    ):
        assert total(**changes).total > least, changes


def test_extrapolated_depth_matches_the_recorded_depth(monkeypatch):
    deep = plan(gptj(n_layer=7))
    extrapolated = Estimator(deep).training(2).components
    monkeypatch.setattr(estimating, "_DEEP", 7)
    recorded = Estimator(deep).training(2).components
    for name in recorded:
        # The unused heap is a multiple of the live bytes, which are accurate to 2 KiB.
        near = 2048 * (estimating._UNUSED if name == "unused heap" else 1)
        assert extrapolated[name] == pytest.approx(recorded[name], rel=0.01, abs=near), name


def test_cpu_components_outside_of_tensors():
    changes = {"length": 100, "eval_rows": 1}
    half = dataclasses.replace(plan(gptj(), **changes), dtype=torch.bfloat16)
    components = Estimator(half).training(4).components
    some = process.COMPILED_PRODUCTS * estimating._COMPILED
    assert some <= components["compiled products"] < 2 * some  # small matrices, about 0.7 MB each
    assert 0 < components["unused heap"] < estimating._MOST_UNUSED
    assert Estimator(plan(gptj())).training(4).components["compiled products"] == 0
    on_gpu = Estimator(dataclasses.replace(half, device="cuda")).training(4).components
    assert not {"compiled products", "unused heap"} & set(on_gpu)
    # Rows of different lengths are padded to a multiple of 16; a single row is not.
    longer = {rows: Estimator(plan(gptj(), length=112)).training(rows).total for rows in (1, 4)}
    same = {rows: Estimator(plan(gptj(), length=100)).training(rows).total for rows in (1, 4)}
    assert same[4] == pytest.approx(longer[4], rel=0.01) and same[1] < 0.95 * longer[1]


def test_only_small_blocks_count_as_heap(monkeypatch):
    batch = Batch(3, 20, 19)
    model = build(gptj(), QUANTIZATION, torch.float32, AdapterSpec("lora", "attention", 4, 8.0, 0))
    trace = trace_training_step(model, batch, "full")
    assert trace.in_heap == max(sum(peak.values()) for peak in trace.peaks.values())
    monkeypatch.setattr("gptj8.memory.trace.LARGE_BLOCK", 3 * 20 * 64)  # less than a row of floats
    model = build(gptj(), QUANTIZATION, torch.float32, AdapterSpec("lora", "attention", 4, 8.0, 0))
    assert 0 < trace_training_step(model, batch, "full").in_heap < trace.in_heap / 2


@pytest.mark.parametrize("rows", [1, 5, 23])
def test_largest_micro_batch_is_the_largest_that_fits(rows):
    found = Estimator(plan(gptj()))
    memory = found.training(rows).total
    largest = found.largest_micro_batch(memory)
    assert largest >= rows
    assert found.training(largest).total <= memory < found.training(largest + 1).total
    assert found.largest_micro_batch(found.training(1).total - 1) == 0


def finetune_params(**changes):
    return parse_params({**MINIMAL, "finetune": changes}).finetune


AUTO = {"per_device_train_batch_size": "auto", "train_batch_size": 12}


def test_auto_chooses_the_largest_divisor_that_fits():
    found = Estimator(plan(gptj()))
    finetune = finetune_params(**AUTO, checkpointing="full")
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert choose_fit(found, finetune, found.training(5).total) == Fit(4, "full")
    assert choose_fit(found, finetune, 1 << 50) == Fit(12, "full")
    message = r"for one sequence of 32 tokens, and only 1\.00 kB can be used"
    with pytest.raises(UserError, match=message):
        choose_fit(found, finetune, 1000)


def test_auto_recomputes_no_more_than_memory_requires():
    found = Estimator(plan(gptj()))
    needed = {kind: found.training(8, kind).total for kind in KINDS["cuda"]}
    assert needed["none"] > needed["selective"] > needed["full"] < needed["reuse"]
    finetune = finetune_params(per_device_train_batch_size=8)
    assert finetune.checkpointing == "auto"
    for kind in ("none", "selective"):  # twice, because only half of a CPU's memory is used
        assert choose_fit(found, finetune, 2 * needed[kind]) == Fit(8, kind)
    assert choose_fit(found, finetune, 2 * needed["selective"] - 2) == Fit(8, "full")
    # A given micro-batch size that does not fit raises no error, because estimates may be wrong.
    assert choose_fit(found, finetune, 1000) == Fit(8, "full")
    # Both auto: the kind is chosen for all 12 sequences first; the micro-batch size shrinks last.
    both = finetune_params(**AUTO)
    whole = found.training(12, "none").total
    assert choose_fit(found, both, 2 * whole) == Fit(12, "none")
    assert choose_fit(found, both, 2 * whole - 2) == Fit(12, "selective")
    assert choose_fit(found, both, found.training(5, "full").total) == Fit(4, "full")


def test_gpu_reuses_matrices_if_activations_do_not_fit():
    # Long rows, so that a block's matrices take less memory than its activations.
    config = gptj(n_positions=1024)
    found = Estimator(dataclasses.replace(plan(config, length=1024), device="cuda"))
    needed = {kind: found.training(2, kind).total for kind in KINDS["cuda"]}
    assert needed["none"] > needed["selective"] > needed["reuse"] > needed["full"]
    matrices = found.training(2, "reuse").components["matrices for gradients"]
    assert needed["reuse"] - needed["full"] <= matrices
    finetune = finetune_params(per_device_train_batch_size=2)
    for kind in KINDS["cuda"]:
        assert choose_fit(found, finetune, needed[kind]) == Fit(2, kind)


def test_recomputation_is_not_used_to_exceed_enough_tokens():
    found = Estimator(plan(gptj(n_positions=1024), length=1024))
    finetune = finetune_params(**AUTO)
    memory = 2 * found.training(3, "none").total
    assert choose_fit(found, finetune, memory) == Fit(3, "none")


def test_confirm_reduces_a_fit_that_runs_out_of_memory():
    tried = []

    def step(rows, kind):
        tried.append((len(rows), kind))
        if len(rows) > 3 or kind != "full":
            raise torch.OutOfMemoryError("out of memory")

    def confirmed(fit, device="cpu", **changes):
        tried.clear()
        return confirm(fit, finetune_params(**changes), device, lambda count: [{}] * count, step)

    assert confirmed(Fit(12, "selective"), **AUTO) == Fit(3, "full")
    assert tried == [(12, "selective"), (12, "full"), (6, "full"), (3, "full")]
    with pytest.raises(torch.OutOfMemoryError):
        confirmed(Fit(12, "none"), **AUTO, checkpointing="none")
    assert tried == [(12, "none"), (6, "none"), (3, "none"), (1, "none")]
    with pytest.raises(torch.OutOfMemoryError):
        confirmed(Fit(4, "none"), per_device_train_batch_size=4)
    assert tried == [(4, "none"), (4, "selective"), (4, "full")]
    assert confirmed(Fit(2, "none"), "cuda", per_device_train_batch_size=2) == Fit(2, "full")
    assert tried == [(2, "none"), (2, "selective"), (2, "reuse"), (2, "full")]

    def fails(rows, kind):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes"):
        confirm(Fit(4, "full"), finetune_params(**AUTO), "cpu", lambda count: [{}] * count, fails)


def test_both_fallbacks_reduce_memory_in_the_same_order():
    """The trial before training, and running out of memory during training."""

    def tried_before_training():
        tried = []

        def step(rows, kind):
            tried.append((len(rows), kind))
            raise torch.OutOfMemoryError("out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            finetune = finetune_params(**AUTO)
            confirm(Fit(12, "none"), finetune, "cpu", lambda count: [{}] * count, step)
        return tried

    tried, settings = [], TrainingSettings(1e-3, 1, 12, checkpointing="none")
    while settings is not None:
        tried.append((settings.per_device_train_batch_size, settings.checkpointing))
        assert settings.rows_per_step == 12
        settings = settings.with_less_memory()
    assert tried == tried_before_training()
    assert tried == [(12, "none"), (12, "selective"), (12, "full")] + [
        (size, "full") for size in (6, 3, 1)
    ]


def test_without_a_report_of_free_memory_everything_is_recomputed(tiny_8bit_dir, monkeypatch):
    def unknown(device):
        raise UserError("this system does not report free memory")

    monkeypatch.setattr(machine, "available_bytes", unknown)
    text = {**MINIMAL, "model": {"path": "y"}}
    given = parse_params({**text, "finetune": {"per_device_train_batch_size": 2}})
    memory = TrainingMemory(given, tiny_8bit_dir, torch.float32, "cpu", some_examples())
    assert memory.fit(lambda *_: None) == Fit(2, "full")
    auto = parse_params({**text, "finetune": {"per_device_train_batch_size": "auto"}})
    memory = TrainingMemory(auto, tiny_8bit_dir, torch.float32, "cpu", some_examples())
    with pytest.raises(UserError, match="does not report free memory; set a number"):
        memory.fit(lambda *_: None)


def some_examples(count=8):
    generator = torch.Generator().manual_seed(0)
    lengths = [8 + 3 * (i % 5) for i in range(count)]
    return [
        {
            "input_ids": torch.randint(1, 380, (n,), generator=generator).tolist(),
            "learned": [n - 3, n],
            "length": n,
        }
        for n in lengths
    ]


def test_try_step_does_not_change_training(tiny_8bit_dir):
    examples = some_examples()
    lengths, learned = lengths_of(examples)
    assert (lengths.max(), learned.max()) == (20, 3)
    settings = TrainingSettings(1e-2, 1, 2, gradient_accumulation_steps=2, eval_steps=2)

    def adapter(tried):
        torch.manual_seed(0)
        model = load_model(tiny_8bit_dir, torch.float32, CPU)
        model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8, lora_dropout=0.3))
        if tried:
            try_step(model, longest_of(examples)(2), "full")
        train(model, examples, examples[:2], settings, 0)
        return [p.detach() for p in model.parameters() if p.requires_grad]

    for one, other in zip(adapter(False), adapter(True), strict=True):
        assert torch.equal(one, other)


def test_contradicting_batch_sizes_raise():
    finetune = finetune_params
    auto = {"per_device_train_batch_size": "auto"}
    assert finetune().sequences_per_step == 8
    assert finetune(**auto).sequences_per_step == 8
    assert finetune(**auto, train_batch_size=32).sequences_per_step == 32
    with pytest.raises(
        UserError, match=r"gradient_accumulation_steps = 4 conflicts with .* leave it at 1"
    ):
        finetune(**auto, gradient_accumulation_steps=4)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert finetune(**sizes, train_batch_size=8).sequences_per_step == 8
    with pytest.raises(UserError, match="train_batch_size = 16 is not") as caught:
        finetune(**sizes, train_batch_size=16)
    assert len(str(caught.value).splitlines()) == 1


def test_calibration_is_saved_and_a_damaged_one_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measured_speed.read("a CPU", "float32") is None
    measured = measured_speed.Calibration(2.5e11, 600_000_000)
    measured_speed.write("a CPU", "float32", measured)
    measured_speed.write("a GPU", "bfloat16", measured_speed.Calibration(1e13))
    assert measured_speed.read("a CPU", "float32") == measured
    (tmp_path / measured_speed.FILE).write_text("[1")
    assert measured_speed.read("a CPU", "float32") is None


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml and a model folder that contains only config.json."""
    only_config(tmp_path / "model", gptj())
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        process_memory, "measuring_process_memory", lambda dtype: nullcontext(lambda: 600 << 20)
    )
    return tmp_path


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["gptj8", "estimate", *arguments])
    main.main()


def test_command_prints_a_table_and_json(project, monkeypatch, capsys):
    run_command(monkeypatch, "--model", "model", "--memory", "2GB")
    shown = capsys.readouterr().out
    assert "process and libraries" in shown
    assert "fits into 2.00 GB" in shown
    assert "not calibrated" in shown
    dtype = str(gptj8_dtype()).removeprefix("torch.")
    measured_speed.write(
        machine.device_name("cpu"), dtype, measured_speed.Calibration(1e9, 500 << 20)
    )
    run_command(monkeypatch, "--model", "model/config.json", "--memory", "2GB", "--json")
    found = json.loads(capsys.readouterr().out)
    training = found["training"]
    assert training["per_device_train_batch_size"] == load_params().finetune.sequences_per_step
    assert sum(training["components"].values()) == training["peak"]
    assert training["components"]["process and libraries"] == 500 << 20
    assert found["tokens_per_second"] == pytest.approx(1e9 / found["flops_per_token"])


def test_settings_that_do_not_fit_are_an_error_after_the_table(project, monkeypatch, capsys):
    size = "finetune.per_device_train_batch_size=64"
    arguments = ["--model", "model", "-S", size, "-S", "finetune.checkpointing=full"]
    run_command(monkeypatch, *arguments, "--memory", "64GB", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["training"]["per_device_train_batch_size"] == 64
    tight = found["training"]["peak"] - 1
    for form in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            run_command(monkeypatch, *arguments, "--memory", str(tight), *form)
        assert ended.value.code == 2
        shown = capsys.readouterr()
        (line,) = (line for line in shown.err.splitlines() if line.startswith("error: "))
        assert "set finetune.per_device_train_batch_size to 63 or less" in line
        if form:
            assert json.loads(shown.out)["fits"] is False
        else:
            assert "does not fit into" in shown.out
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, *arguments, "--memory", "1MB")
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "not even a micro-batch of one sequence fits" in shown.out
    assert "training needs" in shown.err and "evaluation needs" in shown.err
    assert "lower data.max_length" in shown.err


def test_the_largest_size_that_is_tried_is_named_as_such(project, monkeypatch, capsys):
    monkeypatch.setattr(estimating, "LARGEST_TRIED", 16)
    run_command(monkeypatch, "--model", "model", "--memory", "64GB")
    assert "that fits is at least 16; larger ones were not tried" in capsys.readouterr().out
    run_command(monkeypatch, "--model", "model", "--memory", "64GB", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["largest_per_device_train_batch_size"] == found["largest_tried"] == 16


def test_progress_is_shown_in_a_log_after_some_seconds(project, monkeypatch, capsys):
    run_command(monkeypatch, "--model", "model", "--memory", "64GB")
    quick = capsys.readouterr()
    monkeypatch.setattr("gptj8.commands.estimate._LOG_SECONDS", 0.0)
    run_command(monkeypatch, "--model", "model", "--memory", "64GB")
    slow = capsys.readouterr()
    assert quick.out == slow.out
    assert "estimate: 2 of 5 parts, micro-batch of 1, checkpointing" in slow.err
    assert "estimate: 4 of 5 parts, evaluation" in slow.err


def test_each_step_is_recorded_once(monkeypatch):
    """Recording steps is most of the time that an estimate takes."""
    steps = []
    found = Estimator(plan(gptj(n_layer=8)), on_step=steps.append)
    found.training(1)
    assert len(steps) == 2  # two depths
    found.flops_per_token()
    assert len(steps) == 2
    memory = found.training(60).total
    steps.clear()
    assert found.largest_micro_batch(memory) == 60
    assert len(steps) <= 2 * 3  # 8, at most one guess, and 61
    steps.clear()
    assert found.largest_micro_batch(found.weights.base) == 0  # weights and adapter do not fit
    assert steps == []


@pytest.mark.slow
def test_an_estimate_of_a_model_of_6b_takes_at_most_40_seconds_of_processor_time(project):
    """Processor time, because other programs may be running. It is that of two processes, which run
    side by side for a part of the time."""
    sizes = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}
    config = gptj(vocab_size=50400, n_positions=2048, tie_word_embeddings=False, **sizes)
    folder = only_config(project / "large", config)
    command = [sys.executable, "-m", "gptj8.commands.main", "estimate", "--model", str(folder)]
    command += ["--memory", "16GB", "--device", "cpu"]
    measure = (
        "import os, subprocess, sys; code = subprocess.call(sys.argv[1:]);"
        "print(os.times().children_user, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measure, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds = float(done.stderr.splitlines()[-1])
    assert seconds < 40
    assert "that fits is" in done.stdout


def gptj8_dtype():
    from gptj8.model.loading import pick_dtype

    return pick_dtype("auto", CPU)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "nowhere"], ["nowhere has no config.json"]),
        (["--model", "strange"], ["model_type = unheard_of"]),
        (["--model", "model", "--memory", "8 apples"], ["--memory 8 apples", "8GB"]),
        (["--model", "model", "-S", "finetune.rr=4"], ["finetune.rr is not a known key"]),
        (["--model", "model", "-S", "finetune.target=[nothing]"], ["finetune.target"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_command_prints_one_line_errors(project, monkeypatch, capsys, arguments, parts):
    (project / "strange").mkdir()
    (project / "strange" / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, *arguments)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts)


def test_parse_bytes_accepts_decimal_and_binary_units():
    assert parse_bytes("8GB") == 8_000_000_000
    assert parse_bytes("1.5 GiB") == 3 << 29
    assert parse_bytes("123") == 123


def test_params_become_a_plan():
    params = parse_params({**MINIMAL, "data": {"train": "x", "max_length": 4096, "task": "text"}})
    found = plan_of(params, gptj(), torch.float32, "cpu")
    assert (found.length, found.learned) == (512, 511)  # limited by the model's context


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 6])
def test_estimate_is_accurate_to_10_percent(number, tmp_path):
    found = benchmark.compare(number, tmp_path)
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.1)
