"""Small random models of several architectures, with weights large enough to vary the tokens."""

from __future__ import annotations

import torch

VOCABULARY = 131

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
_NEOX = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

ARCHITECTURES = {
    "gptj": {**_GPT2, "rotary_dim": 8},
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
}


def make_model(
    architecture: str, attention: str | None = None, context: int = 64
) -> torch.nn.Module:
    """Return a float32 model in eval mode. Token 0 is both BOS and EOS."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
        max_position_embeddings=context,
        **ARCHITECTURES[architecture],
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
