"""Test 8-bit models with transformers, PEFT, accelerate and DDP, without special calls."""

import os
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import gptj8
from gptj8.quantization.layers import Frozen8bitLinear
from gptj8.runtime.errors import QuantizationError

IDS = torch.randint(1, 300, (4, 12), generator=torch.Generator().manual_seed(0))
ON_THE_FLY = {"quantization_config": gptj8.Blockwise8bitConfig(block_size=256)}


@pytest.fixture(params=["converted", "on-the-fly"])
def source(request, tiny_model_dir, tiny_8bit_dir):
    """Return arguments of from_pretrained that load the same 8-bit model in one of two ways."""
    return (tiny_8bit_dir, {}) if request.param == "converted" else (tiny_model_dir, ON_THE_FLY)


def gradients(model, batch):
    model(input_ids=batch, labels=batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
def test_a_device_map_places_the_model(source, device_map):
    path, arguments = source
    placed = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, **arguments)
    plain = AutoModelForCausalLM.from_pretrained(path, **arguments)
    assert isinstance(placed.lm_head, Frozen8bitLinear)
    assert torch.equal(placed(IDS).logits, plain(IDS).logits)


ON_DISK = {
    "transformer.wte": "cpu",
    "transformer.drop": "cpu",
    "transformer.h.0": "cpu",
    "transformer.h.1": "disk",
    "transformer.ln_f": "cpu",
    "lm_head": "disk",
}


def test_layers_on_disk_cannot_be_quantized_on_the_fly(tiny_model_dir, tmp_path):
    with pytest.raises(QuantizationError, match=r"is on the disk .* gptj8 convert"):
        AutoModelForCausalLM.from_pretrained(
            tiny_model_dir,
            device_map=ON_DISK,
            offload_folder=tmp_path,
            quantization_config=gptj8.Blockwise8bitConfig(),
        )


def test_layers_can_be_offloaded_to_disk(tiny_8bit_dir, tmp_path):
    """device_map="auto" offloads layers if a model is larger than the memory of the machine."""
    placed = AutoModelForCausalLM.from_pretrained(
        tiny_8bit_dir, device_map=ON_DISK, offload_folder=tmp_path
    )
    assert placed.transformer.h[1].mlp.fc_in.weight.device.type == "meta"
    plain = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    with torch.no_grad():
        assert torch.equal(placed(IDS).logits, plain(IDS).logits)


def test_trainer_trains_the_model(source, tmp_path):
    path, arguments = source
    model = AutoModelForCausalLM.from_pretrained(path, **arguments)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    settings = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        optim="adamw_bnb_8bit",
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    result = Trainer(model, settings, train_dataset=rows).train()
    assert result.training_loss > 0
    assert all(bool(p.detach().any()) for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_can_be_trained_with_lora(tiny_8bit_dir, which):
    def biases(model):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["fc_in"], bias=which, init_lora_weights=False)
        found = gradients(get_peft_model(model, config), IDS)
        return {n: g for n, g in found.items() if n.endswith("bias")}

    load = AutoModelForCausalLM.from_pretrained
    ours, theirs = biases(load(tiny_8bit_dir)), biases(load(tiny_8bit_dir).dequantize())
    assert len(ours) == (2 if which == "lora_only" else 8)  # ln_1, fc_in, fc_out; ln_f, lm_head
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_layer_norms_can_be_tuned_with_peft(tiny_8bit_dir):
    def norms(model):
        config = LNTuningConfig(target_modules=["ln_1", "ln_f"])
        return gradients(get_peft_model(model, config), IDS)

    load = AutoModelForCausalLM.from_pretrained
    ours, theirs = norms(load(tiny_8bit_dir)), norms(load(tiny_8bit_dir).dequantize())
    assert len(ours) == 6
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_are_the_same_without_gradients(tiny_8bit_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    expected = model(IDS).logits
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        assert not model(IDS).logits.requires_grad
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)


def _worker(rank: int, model: torch.nn.Module, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    parallel = DistributedDataParallel(model)
    batch = IDS[2 * rank : 2 * rank + 2]
    parallel(input_ids=batch, labels=batch).loss.backward()
    if rank == 0:
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        save_file(found, folder / "gradients")
    distributed.barrier()
    # Exit immediately, because gloo's destructors can deadlock.
    os._exit(0)


@pytest.mark.slow
def test_data_parallel_gradients_match_a_single_process(tiny_8bit_dir, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    multiprocessing.spawn(_worker, (model, tmp_path), nprocs=2)
    averaged = load_file(tmp_path / "gradients")
    # All rows have the same length, so the mean over workers is the mean over all rows.
    single = gradients(model, IDS)
    assert averaged.keys() == single.keys() and len(single) == 4
    for name, gradient in single.items():
        torch.testing.assert_close(averaged[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
