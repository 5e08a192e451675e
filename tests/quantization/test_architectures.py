"""Test conversion, LoRA training and generation with causal language models of other families."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import gptj8
from gptj8.model.generation.batch import GenerationBatch
from gptj8.model.generation.sampling import Sampling
from gptj8.quantization.layers import Frozen8bitModule
from gptj8.runtime.errors import UserError
from tests.helpers.architectures import ARCHITECTURES, COMMON, GPT2

IDS = torch.randint(1, 300, (2, 10), generator=torch.Generator().manual_seed(0))
CONFIG = gptj8.Blockwise8bitConfig(block_size=64)


@pytest.fixture(params=ARCHITECTURES)
def saved(request, tmp_path):
    """Return a small random model of one architecture and the directory it is saved in."""
    name, sizes = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, **COMMON)).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_convert_train_and_generate(saved, tmp_path):
    original, folder = saved
    gptj8.convert_checkpoint(folder, tmp_path / "8bit", CONFIG)
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "8bit").eval()
    expected, logits = original(IDS).logits, model(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.02

    on_the_fly = load(folder, quantization_config=CONFIG).eval()
    assert torch.equal(on_the_fly(IDS).logits, logits)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").eval()(IDS).logits, logits)
    twin = load(tmp_path / "8bit").dequantize(torch.float32).eval()
    torch.testing.assert_close(twin(IDS).logits, logits, rtol=1e-4, atol=1e-5)

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora).train()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    adapted.eval()
    generated = adapted.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False
    )
    assert generated.shape == (2, 13)


def test_all_large_matrices_are_in_8_bits_and_stored_once(saved, tmp_path):
    original, folder = saved
    report = gptj8.convert_checkpoint(folder, tmp_path / "8bit", CONFIG)
    matrices = {name for name, tensor in original.state_dict().items() if tensor.dim() == 2}
    with safe_open(tmp_path / "8bit" / "model.safetensors", "pt") as stored:
        large = {n: stored.get_tensor(n).dtype for n in stored.keys() if n in matrices}
    assert set(large.values()) == {torch.uint8}
    distinct = {p.data_ptr(): p for p in original.parameters() if p.dim() == 2}
    assert len(large) == len(distinct) == len(report.tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit")
    if original.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, Frozen8bitModule)
        assert head.weight.data_ptr() == embedding.weight.data_ptr()
        assert head.absmax.data_ptr() == embedding.absmax.data_ptr()


def test_skipping_a_tied_module_skips_both(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.GPT2Config(**GPT2, **COMMON)).eval()
    model.save_pretrained(tmp_path / "model")
    config = gptj8.Blockwise8bitConfig(block_size=64, skip_modules=["lm_head"])
    gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit").eval()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_tied_weights_that_differ_raise(tmp_path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_config(transformers.GPT2Config(**GPT2, **COMMON))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "lm_head.weight": torch.zeros(320, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", CONFIG)


def test_batched_generation_matches_single_prompts(saved):
    model, _ = saved
    with torch.no_grad():
        for parameter in model.parameters():  # separates the logits, so rounding has no effect
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [13], [14, 15, 16]]
    expected = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        written = output[0, len(prompt) :].tolist()
        expected.append(written[: written.index(0)] if 0 in written else written)
    batch = GenerationBatch(model, 320, 0)
    rows = batch.add(prompts[:1], [Sampling(10)])
    batch.step()
    rows += batch.add(prompts[1:], [Sampling(10)] * 2)
    while batch.rows:
        batch.step()
    assert [row.ids for row in rows] == expected
