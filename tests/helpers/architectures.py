"""Small configs of several causal language model families, by a short name of the family."""

COMMON = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
NEOX = {**LLAMA, "max_position_embeddings": 64}
NEOX.pop("num_key_value_heads")
ARCHITECTURES = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", NEOX),
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 8}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaConfig", LLAMA),
    "qwen2-tied": ("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", LLAMA),
}
