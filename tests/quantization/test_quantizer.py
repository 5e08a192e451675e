"""Test the quantizer with transformers and PEFT on small random models."""

import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gptj8
from gptj8.model.loading import load_model
from gptj8.quantization.codec import QuantizationError
from gptj8.quantization.layers import Frozen8bitEmbedding, Frozen8bitLinear
from gptj8.quantization.model_files import check_tensors
from gptj8.runtime.errors import UserError

IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def test_importing_the_package_does_not_import_torch():
    code = "import sys, gptj8; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import gptj8, transformers",
        "import transformers, gptj8",
        "import transformers.quantizers, gptj8",
        "import gptj8.quantization.quantizer",
    ],
)
def test_the_quantizer_is_registered_for_any_import_order(first):
    code = (
        f"{first}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "assert m['blockwise_8bit'].__module__ == 'gptj8.quantization.quantizer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_conversion_on_the_fly_equals_conversion_on_disk(tiny_model_dir, tiny_8bit_dir):
    config = gptj8.Blockwise8bitConfig(block_size=256)
    on_the_fly = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    on_disk = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    states = on_the_fly.state_dict(), on_disk.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert isinstance(on_disk.lm_head, Frozen8bitLinear)
    assert isinstance(on_disk.transformer.wte, Frozen8bitEmbedding)


def test_save_pretrained_writes_the_loaded_tensors_unchanged(tiny_8bit_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_8bit_dir).save_pretrained(tmp_path)
    before = load_file(tiny_8bit_dir / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_transformers_without_gptj8_refuses_a_converted_model(tiny_8bit_dir, tmp_path):
    """It does not know the quantizer, and would otherwise take codes for weights."""
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(tiny_8bit_dir).save_pretrained(saved)
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    for folder in (tiny_8bit_dir, saved):
        plain = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True
        )
        assert plain.returncode == 1
        assert plain.stderr.splitlines()[-1].startswith("RuntimeError: You set `ignore_mismatched")
        known = subprocess.run([sys.executable, "-c", f"import gptj8; {code}", str(folder)])
        assert known.returncode == 0


def test_codes_in_the_shape_of_the_weight_are_still_read(tiny_8bit_dir, tmp_path):
    """Earlier versions stored codes in that shape."""
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    old = shutil.copytree(tiny_8bit_dir, tmp_path / "old")
    save_file(dict(model.state_dict()), old / "model.safetensors", {"format": "pt"})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(old)(IDS).logits, model(IDS).logits)
    check_tensors(old)
    check_tensors(tiny_8bit_dir)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loading_in_another_dtype_does_not_change_the_scales(tiny_8bit_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir, dtype=dtype)
    stored = load_file(tiny_8bit_dir / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, Frozen8bitLinear | Frozen8bitEmbedding):
            assert torch.equal(module.absmax, stored[f"{name}.absmax"])
            assert torch.equal(module.codebook, stored[f"{name}.codebook"])
    assert model(IDS).logits.dtype == dtype


def test_logits_match_the_restored_model(tiny_8bit_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir).eval()
    expected = model(IDS).logits
    twin = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir).dequantize(torch.float32).eval()
    assert not any(p.dtype == torch.uint8 for p in twin.parameters())
    torch.testing.assert_close(twin(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_loading_and_moving_preserve_rotary_tables(tiny_model_dir, tiny_8bit_dir):
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir).to("cpu")
    expected = original.transformer.h[1].attn.embed_positions
    assert torch.equal(model.transformer.h[1].attn.embed_positions, expected)


def test_skipped_modules_stay_in_full_precision(tiny_model_dir):
    config = gptj8.Blockwise8bitConfig(skip_modules=["lm_head", "h.1.mlp"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.transformer.h[1].mlp.fc_in) is torch.nn.Linear
    assert isinstance(model.transformer.h[0].mlp.fc_in, Frozen8bitLinear)


@pytest.mark.parametrize(
    ("target", "adapted"),
    [(["q_proj", "v_proj"], 4), ("all-linear", 12), (["wte", "q_proj"], 3)],
    ids=["attention", "all-linear", "embedding"],
)
def test_lora_gradients_match_the_restored_model(tiny_8bit_dir, target, adapted):
    def losses_and_gradients(model, checkpointing):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules=target, task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = get_peft_model(model, config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    load = AutoModelForCausalLM.from_pretrained
    expected = losses_and_gradients(load(tiny_8bit_dir).dequantize(torch.float32), False)
    assert len(expected) == 2 * adapted
    for checkpointing in (False, True):
        ours = losses_and_gradients(load(tiny_8bit_dir), checkpointing)
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_an_adapter_gives_the_same_logits_after_saving_and_loading(tiny_8bit_dir, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_8bit_dir), config).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits, expected)


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
def test_merging_an_adapter_into_8bit_weights_raises(tiny_8bit_dir, safe):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_8bit_dir), config).eval()
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="cannot be merged into 8-bit weights"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(model(IDS).logits, expected)


def test_merging_into_a_restored_model_gives_the_same_logits(tiny_8bit_dir, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_8bit_dir), config).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    restored = AutoModelForCausalLM.from_pretrained(tiny_8bit_dir).dequantize(torch.float32)
    merged = PeftModel.from_pretrained(restored, tmp_path).merge_and_unload().eval()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


CONTINUE = """
import sys, bitsandbytes, torch, gptj8
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

def continued(model, answers):
    ids = torch.arange(1, 25).view(2, 12)
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    weights = [p for p in model.parameters() if p.requires_grad]
    # Use 8-bit state from 64 weights on; by default it is 32-bit for such small matrices.
    optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=1e-2, min_8bit_size=64)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file({**state, "logits": model(ids).logits.detach()}, answers)

if __name__ == "__main__":
    continued(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_training_a_reloaded_model_is_bit_identical(tiny_model_dir, tmp_path):
    """A quantized model gives the same results if it is saved and loaded in a new process first."""
    config = gptj8.Blockwise8bitConfig(block_size=256)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "continue.py").write_text(CONTINUE)
    script = [sys.executable, tmp_path / "continue.py", tmp_path / "model", tmp_path / "reloaded"]
    subprocess.run(script, check=True)
    namespace: dict = {"__name__": "here"}
    exec(CONTINUE, namespace)
    namespace["continued"](model, tmp_path / "never-saved")
    ours, theirs = load_file(tmp_path / "reloaded"), load_file(tmp_path / "never-saved")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moved = [n for n in ours if "lora_B" in n]
    assert all(bool(ours[name].any()) for name in moved) and len(moved) == 12


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codebook", lambda t: t.flip(0), "codebook is not ascending"),
        ("codebook", lambda t: t[:255], r"shape \(255,\), but config.json implies \(256,\)"),
        ("codebook", lambda t: t * float("nan"), "is not finite"),
        ("levels", lambda t: t / 0.0, "is not finite"),
        ("levels", lambda t: t[:-1], r"shape \(255,\), but .* implies \(256,\)"),
        ("absmax", lambda t: t.float(), "absmax is torch.float32, not torch.uint8"),
        ("absmax", lambda t: t[:-1], r"shape \(63,\), but .* implies \(64,\)"),
        ("weight", lambda t: t[:-1], r"shape \(16383,\), but .* implies \(256, 64\)"),
    ],
    ids=[
        "descending",
        "255",
        "nan",
        "infinite",
        "levels-short",
        "absmax-float",
        "absmax-short",
        "weight-short",
    ],
)
def test_damaged_tensors_raise_and_are_named(tiny_8bit_dir, tmp_path, part, change, message):
    folder = shutil.copytree(tiny_8bit_dir, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = f"transformer.h.1.mlp.fc_in.{part}"
    state[name] = change(state[name]).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "manifest.json").unlink()  # its checksum error would name the file, not the tensor
    with pytest.raises((ValueError, RuntimeError, UserError), match=message) as caught:
        load_model(folder, torch.float32, torch.device("cpu"))
    assert "fc_in" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"block_size": 3}, "block_size = 3"), ({"codebook": "linear"}, "codebook = 'linear'")],
)
def test_invalid_configs_raise(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        gptj8.Blockwise8bitConfig(**arguments)
