"""Test the settings of LoRA: initial weights and scaling on 8-bit layers."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from gptj8.model.adapters import AdapterSpec, _make_orthogonal, add_adapter, save_adapter
from gptj8.model.loading import load_model
from gptj8.runtime.errors import UserError

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 2, 7, 11]])


def adapted(folder, **changes):
    torch.manual_seed(0)
    model = load_model(folder, torch.float32, CPU)
    return add_adapter(model, AdapterSpec(r=4, lora_alpha=8, **changes))


def matrices(model, kind):
    return [p for n, p in model.named_parameters() if f".lora_{kind}." in n]


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_training_begins_at_the_base_model(tiny_8bit_dir, init):
    wanted = load_model(tiny_8bit_dir, torch.float32, CPU)(IDS).logits
    found = adapted(tiny_8bit_dir, init_lora_weights=init)(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_initial_weights_are_those_of_the_chosen_kind(tiny_8bit_dir):
    found = {
        init: adapted(tiny_8bit_dir, init_lora_weights=init)
        for init in (True, False, "gaussian", "orthogonal")
    }
    for init, model in found.items():
        is_zero = [not b.any() for b in matrices(model, "B")]
        assert is_zero == [init in (True, "gaussian")] * len(is_zero), init
    values = torch.cat([a.detach().flatten() for a in matrices(found["gaussian"], "A")])
    assert float(values.std()) == pytest.approx(1 / 4, rel=0.05)
    assert values.abs().max() > 3 / 4  # a uniform distribution with that spread ends at 0.43
    for a, b in zip(*(matrices(found["orthogonal"], kind) for kind in "AB"), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (b @ a).abs().max() < 1e-5 < a.abs().min(dim=1).values.max()
        assert b.abs().mean() > 0.01


def test_orthogonal_weights_are_those_of_peft():
    """PEFT's own initialization works on layers in full precision."""
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = get_peft_model(nn.Sequential(nn.Linear(6, 10)), config)
    layer = theirs.base_model.model[0]
    torch.manual_seed(3)
    layer.orthogonal_init("default")
    wanted = [p.clone() for p in theirs.parameters() if p.requires_grad]
    torch.manual_seed(3)
    _make_orthogonal(theirs)
    for found, expected in zip(
        (p for p in theirs.parameters() if p.requires_grad), wanted, strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_a_saved_adapter_loads_and_computes_the_same(tiny_8bit_dir, tmp_path, init, use_rslora):
    model = adapted(tiny_8bit_dir, init_lora_weights=init, use_rslora=use_rslora)
    for b in matrices(model, "B"):
        nn.init.normal_(b, std=0.1)
    wanted = model.eval()(IDS).logits
    save_adapter(model, tmp_path, torch.float32)
    base = load_model(tiny_8bit_dir, torch.float32, CPU)
    assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path))(IDS).logits, wanted)


def test_rslora_scales_by_the_root_of_the_rank(tiny_8bit_dir):
    def scaling(use_rslora):
        model = adapted(tiny_8bit_dir, use_rslora=use_rslora)
        return {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}

    assert scaling(False) == {8 / 4}
    assert scaling(True) == {8 / math.sqrt(4)}


def test_a_wrong_target_beside_a_right_one_is_refused_with_the_names_that_exist(tiny_8bit_dir):
    with pytest.raises(UserError) as caught:
        adapted(tiny_8bit_dir, target=["q_proj", "v_prj"])
    (line,) = str(caught.value).splitlines()
    assert "the model has no module v_prj, did you mean v_proj?" in line
    for name in ("wte", "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "lm_head"):
        assert name in line.partition("its linear layers and embeddings: ")[2]
