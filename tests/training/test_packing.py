"""Test packing: the layout of rows, equal losses and gradients, refused models, and resuming."""

import dataclasses
import random
import types

import pytest
import torch
import transformers

import gptj8
from gptj8.dataset.prepared.examples import IGNORED, padded_length
from gptj8.memory.estimate import Estimator, _packed, plan_of
from gptj8.memory.skeleton import build, read_config
from gptj8.memory.trace import Batch, _Recorder, trace_training_step
from gptj8.model.adapters import AdapterSpec, add_adapter
from gptj8.model.loading import load_model
from gptj8.params.sections import parse_params
from gptj8.quantization.quantizer import Blockwise8bitConfig
from gptj8.runtime.errors import UserError
from gptj8.training.batches import Collator
from gptj8.training.loop import try_step
from gptj8.training.loss import frozen_head, summed_loss
from gptj8.training.packing import PackedCollator, lay_out, longest_sequence, require_packable
from tests.conftest import gptj_config
from tests.helpers.architectures import ARCHITECTURES, COMMON
from tests.helpers.training_rows import (
    CPU,
    adapted_model,
    assert_resumes,
    changed,
    trained,
)

PACKED = changed(packing=True, load_best_model_at_end=True)
LENGTHS = [5, 21, 9, 14, 3, 17]


def rows_of(lengths, vocabulary=300):
    """Return rows whose learned spans begin at the first token, in the middle, and twice."""
    draw = random.Random(1)
    found = []
    for number, n in enumerate(lengths):
        learned = ([0, n], [n // 2, n], [1, 2, n - 1, n])[number % 3]
        ids = [draw.randrange(vocabulary) for _ in range(n)]
        found.append({"input_ids": ids, "learned": learned, "length": n})
    return found


def collators(context=64, device=CPU):
    config = types.SimpleNamespace(n_positions=context)
    model = types.SimpleNamespace(config=config, device=device)
    return Collator(0, model), PackedCollator(0, model)


def converted(name, folder):
    kind, settings = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**{**COMMON, **settings})
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "embed_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    gptj8.convert_checkpoint(
        folder / "model", folder / "base", gptj8.Blockwise8bitConfig(block_size=64)
    )
    return folder / "base"


def test_rows_are_laid_end_to_end():
    _, packed = collators()
    examples = rows_of(LENGTHS)
    batch = packed(examples)
    assert len(batch["input_ids"]) < len(LENGTHS)
    found = []
    for ids, places, used, labels in zip(
        *(batch[k].tolist() for k in ("input_ids", "position_ids", "attention_mask", "labels")),
        strict=True,
    ):
        starts = [
            i
            for i, (place, is_used) in enumerate(zip(places, used, strict=True))
            if is_used and place == 0
        ]
        end = sum(used)
        assert used == [1] * end + [0] * (len(used) - end)
        assert set(labels[end:]) <= {IGNORED} and not any(places[end:])
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            assert places[start:stop] == list(range(stop - start))
            found.append((ids[start:stop], labels[start:stop]))
    wanted = []
    for example in examples:
        ends = iter(example["learned"])
        is_learned = {i for start, end in zip(ends, ends, strict=True) for i in range(start, end)}
        labels = [
            i if n in is_learned and n else IGNORED for n, i in enumerate(example["input_ids"])
        ]
        wanted.append((example["input_ids"], labels))
    assert sorted(found) == sorted(wanted)


def test_rows_of_equal_length_stay_as_they_are():
    """Running text is cut into rows of equal length."""
    plain, packed = collators()
    for lengths in ([64] * 4, [40] * 3, [17]):
        batch = packed(rows_of(lengths))
        assert batch.keys() == plain(rows_of(lengths)).keys()
        for name, tensor in plain(rows_of(lengths)).items():
            assert torch.equal(batch[name], tensor)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layouts_are_complete_and_within_the_memory_of_the_estimate(device):
    draw = random.Random(0)
    packs = 0
    for context in (64, 1024):
        padded = lambda n, context=context: padded_length(n, context, device)  # noqa: E731
        for _ in range(300):
            count, longest = draw.randint(1, 33), draw.randint(2, context)
            lengths = [draw.randint(1, longest) for _ in range(count)]
            most = max(longest_sequence(context), *lengths)
            sequences = lay_out(lengths, most, padded)
            assert sorted(row for rows in sequences for row in rows) == list(range(count))
            size = padded(max(sum(lengths[row] for row in rows) for rows in sequences))
            if len(sequences) == count:
                continue
            packs += 1
            assert size <= padded(most)
            alone = padded(max(lengths))
            assert len(sequences) * size <= count * alone
            bound = _packed(Batch(count, padded(longest), 3), context)
            assert len(sequences) * size <= bound.rows * bound.length
            assert len(sequences) * size**2 <= bound.rows * bound.length**2
            logits = len(sequences) * min(size, 3 * count)
            assert logits <= bound.rows * bound.learned
    assert packs > 200


@pytest.mark.parametrize(
    "name", ["gptj", "gpt2", "gpt_neo", "gpt_neox", "llama", "qwen2-tied", "mistral"]
)
@pytest.mark.parametrize("is_chunked", [True, False], ids=["frozen-head", "plain-head"])
def test_loss_and_gradients_equal_those_of_padded_rows(name, is_chunked, tmp_path, monkeypatch):
    model = load_model(converted(name, tmp_path), torch.float32, CPU)
    model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8, init_lora_weights=False)).train()
    model.config.use_cache = False
    if not is_chunked:
        monkeypatch.setattr("gptj8.training.loss.frozen_head", lambda model: None)
    require_packable(model)
    assert model.training
    plain, packed = Collator(0, model), PackedCollator(0, model)
    found = {}
    for collator in (plain, packed):
        batch = collator(rows_of(LENGTHS))
        total, learned, _ = summed_loss(model, batch)
        total.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[collator] = total.detach(), int(learned), gradients, batch
        model.zero_grad(set_to_none=True)
    assert "position_ids" in found[packed][3] and "position_ids" not in found[plain][3]
    assert found[packed][1] == found[plain][1]
    torch.testing.assert_close(found[packed][0], found[plain][0], rtol=1e-5, atol=1e-4)
    assert len(found[plain][2]) > 4
    for key, wanted in found[plain][2].items():
        tolerance = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found[packed][2][key], wanted, rtol=1e-3, atol=tolerance)
    assert (frozen_head(model) is not None) or not is_chunked


@pytest.mark.parametrize("name", ["bloom", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_cannot_be_packed_are_refused(name, dtype, tmp_path):
    model = load_model(converted(name, tmp_path), dtype, CPU)
    model = add_adapter(model, AdapterSpec(r=4, lora_alpha=8))
    with pytest.raises(UserError) as caught:
        require_packable(model)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"finetune.packing = true: models of type {name} cannot be packed (")
    assert line.endswith("; set it to false")


def test_the_proof_leaves_the_model_as_it_was(tiny_8bit_dir):
    model = adapted_model(tiny_8bit_dir, dtype=torch.bfloat16)
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    state, ids = torch.get_rng_state(), torch.tensor([[3, 4, 5]])
    logits = model.eval()(input_ids=ids).logits
    require_packable(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_packed_training_has_the_same_steps_and_counts(tiny_8bit_dir, examples):
    settings = changed(optim="adamw_torch", per_device_train_batch_size=4)
    weights, wanted = trained(tiny_8bit_dir, examples, settings, dropout=0.0)
    settings = dataclasses.replace(settings, packing=True)
    packed, found = trained(tiny_8bit_dir, examples, settings, dropout=0.0)
    assert any(not torch.equal(packed[name], weight) for name, weight in weights.items())
    for name, weight in weights.items():
        torch.testing.assert_close(packed[name], weight, rtol=1e-2, atol=1e-3, msg=name)
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-4)
    for key in ("steps", "tokens", "learned_tokens", "per_device_train_batch_size"):
        assert found[key] == wanted[key]
    assert 0 < found["padding_fraction"] < wanted["padding_fraction"]


def test_speed_counts_packed_rows_and_tokens(tiny_8bit_dir, examples):
    from gptj8.training.loop import train

    settings = changed(packing=True, per_device_train_batch_size=4)
    result = train(adapted_model(tiny_8bit_dir), examples, examples, settings, 0)
    tokens = 3 * sum(len(example["input_ids"]) for example in examples)
    seconds = tokens / result.tokens_per_second
    assert result.samples_per_second * seconds == pytest.approx(3 * len(examples))


@pytest.mark.parametrize(
    "call", [9, 26, *(pytest.param(c, marks=pytest.mark.slow) for c in range(3, 48, 4))]
)
def test_packed_training_resumes_exactly(tiny_8bit_dir, examples, checkpoints, monkeypatch, call):
    assert_resumes(tiny_8bit_dir, examples, checkpoints, monkeypatch, call, PACKED)


@pytest.mark.parametrize("method", ["lora", "layernorm"])
def test_packing_works_in_bfloat16(tiny_8bit_dir, examples, method):
    kind = {"method": method, "dtype": torch.bfloat16, "dropout": 0.0}
    settings = changed(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    _, wanted = trained(tiny_8bit_dir, examples, settings, **kind)
    _, found = trained(tiny_8bit_dir, examples, dataclasses.replace(settings, packing=True), **kind)
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.02)
    assert found["padding_fraction"] < wanted["padding_fraction"]


def test_trying_a_step_packs_as_training_does(tiny_8bit_dir, monkeypatch):
    model, shapes = adapted_model(tiny_8bit_dir), []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        shapes.append((tuple(kwargs["input_ids"].shape), "position_ids" in kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    for packing in (False, True):
        try_step(model, rows_of(LENGTHS), "none", packing)
    assert [is_packed for _, is_packed in shapes] == [False, True]
    assert shapes[0][0] == (6, 32) and shapes[1][0][0] < 6


@pytest.mark.parametrize("task", ["classification", "completion", "text"])
def test_the_estimate_is_not_below_that_of_padded_rows(task):
    def estimate(packing):
        template = {"completion": "{prompt}"}.get(task, "{text}")
        params = parse_params(
            {
                "data": {"train": "x", "task": task, "prompt_template": template, "max_length": 40},
                "model": {"path": "m"},
                "finetune": {"packing": packing},
            }
        )
        return Estimator(plan_of(params, gptj_config(), torch.float32, "cpu")).training(8)

    plain, packed = estimate(False), estimate(True)
    assert packed.total >= plain.total
    assert (packed == plain) == (task == "text")


@pytest.mark.parametrize("lengths", [LENGTHS * 2, [30, 2, 2, 2, 30, 9], [20, 19] * 8], ids=len)
def test_the_recorded_step_covers_a_real_packed_step(tiny_8bit_dir, lengths):
    model = adapted_model(tiny_8bit_dir, dropout=0.0).train()
    model.config.use_cache = False
    examples = rows_of(lengths)
    batch = PackedCollator(0, model)(examples)
    assert "position_ids" in batch
    recorder = _Recorder()
    recorder.leave_out(model)
    with recorder:
        total, _, _ = summed_loss(model, batch)
        recorder.enter("backward", "backward")
        total.backward()
    real = recorder.result()
    config = read_config(tiny_8bit_dir)
    learned = max(len(example["input_ids"]) - 1 for example in examples)
    padded = Batch(len(lengths), padded_length(max(lengths), 128, "cpu"), learned)
    recorded = trace_training_step(
        build(
            config,
            Blockwise8bitConfig(block_size=256),
            torch.float32,
            AdapterSpec(r=4, lora_alpha=8),
        ),
        _packed(padded, 128),
        "none",
    )
    most = {
        which: max(sum(peak.values()) for peak in trace.peaks.values())
        for which, trace in (("real", real), ("recorded", recorded))
    }
    assert most["recorded"] >= most["real"]
