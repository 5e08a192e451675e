"""60 causal language models of transformers: right in 8 bits, or refused by name.

Each is built small, with random weights, and converted. The 8-bit model is compared with its
restored twin: logits, and the gradients of one LoRA step.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import gptj8
from gptj8.quantization.layers import Frozen8bitModule
from gptj8.runtime.errors import UserError
from tests.helpers import architectures

pytestmark = pytest.mark.slow

LLAMA = {**architectures.LLAMA, "max_position_embeddings": 64}
GPT2 = architectures.GPT2
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}
ROTARY = {**LLAMA, "head_dim": 16}
RIGHT = {
    **dict.fromkeys(
        "Llama Mistral Qwen2 Qwen3 Olmo Olmo2 Olmo3 Phi Phi3 StableLm Starcoder2 Cohere "
        "Cohere2 Granite Persimmon Nemotron SmolLM3 Ernie4_5 Apertus DiffLlama Arcee BitNet "
        "Exaone4 Lfm2 NanoChat SeedOss Cwm Jais2 Ministral3 Falcon TrOCR Doge".split(),
        LLAMA,
    ),
    **dict.fromkeys(
        "Gemma Gemma2 Gemma3Text Gemma4Text VaultGemma Glm Glm4 Helium Ministral "
        "HunYuanDenseV1".split(),
        ROTARY,
    ),
    **dict.fromkeys(("GPT2", "GPTBigCode", "OpenAIGPT"), GPT2),
    **{name: {**GPT2, "rotary_dim": 8} for name in ("GPTJ", "CodeGen")},
    **dict.fromkeys(("Bart", "MBart", "Pegasus", "Blenderbot", "Marian"), SEQ2SEQ),
    **{name: {**LLAMA, "is_decoder": True} for name in ("Bert", "Roberta", "Electra")},
    "CTRL": {**GPT2, "dff": 128},
    "GPTNeo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "GPTNeoX": LLAMA,
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "OPT": {**LLAMA, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "XGLM": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "BioGpt": LLAMA,
    "RecurrentGemma": {**LLAMA, "num_hidden_layers": 3, "lru_width": 64},
}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
REFUSED = {
    "Mamba": (MAMBA, "computes with the weight of"),
    "FalconMamba": (MAMBA, "computes with the weight of"),
    "Mamba2": ({**MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1}, "or with its dtype"),
    "Rwkv": ({"hidden_size": 64, "num_hidden_layers": 2, "context_length": 64}, "computes with"),
    "xLSTM": ({"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4}, "or with its dtype"),
    "Mixtral": (LLAMA, "has no 8-bit form"),
    "Qwen2Moe": (LLAMA, "has no 8-bit form"),
}


def build(name, settings):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return AutoModelForCausalLM.from_config(kind(vocab_size=128, **ids, **settings)).eval()


def test_there_are_60():
    assert len(RIGHT) + len(REFUSED) >= 60


@pytest.mark.parametrize("name", RIGHT)
def test_8_bit_model_equals_its_restored_twin(name, tmp_path):
    build(name, RIGHT[name]).save_pretrained(tmp_path / "model")
    config = gptj8.Blockwise8bitConfig(embedding_block_size=64)
    report = gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "8bit", dtype=torch.float32).eval()
    frozen = [m for m in model.modules() if isinstance(m, Frozen8bitModule)]
    in_8_bits = sum({id(m.weight): m.weight.numel() for m in frozen}.values())
    total = sum(p.numel() for p in model.parameters())
    assert in_8_bits > 0.8 * total
    kept = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Embedding | Conv1D) and not isinstance(m, Frozen8bitModule)
    ]
    assert len(kept) == (name in ("Olmo", "NanoChat"))  # one matrix keeps the model's dtype
    assert report.unproven is None
    twin = copy.deepcopy(model).dequantize()
    ids = torch.randint(2, 120, (2, 12))
    with torch.no_grad():
        expected = twin(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / "again")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        torch.testing.assert_close(reloaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)

    gradients = []
    for base in (model, twin):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(base, config).train(False)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    norm = sum(float(g.norm()) for g in gradients[1].values())
    difference = sum(float((g - gradients[1][n]).norm()) for n, g in gradients[0].items())
    assert norm > 0 and difference < 1e-4 * norm


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    settings, reason = REFUSED[name]
    build(name, settings).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=reason) as raised:
        gptj8.convert_checkpoint(tmp_path / "model", tmp_path / "8bit", gptj8.Blockwise8bitConfig())
    assert "skip_modules" in str(raised.value) and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
