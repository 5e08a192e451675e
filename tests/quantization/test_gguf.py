"""GGUF files are unpacked into the model and tokenizer that they were made from.

The files are written with the `gguf` package, with llama.cpp's names and layout.
"""

from __future__ import annotations

import json
import random

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gptj8.commands.main import main
from gptj8.quantization.gguf import unpack_gguf
from gptj8.runtime.errors import UserError

TEXT = "In 2024 the 3 wizards had 12345  boxes,  7 jugs\n\nand a fox.  99"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
HEADS, KEY_HEADS = 4, 2
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer that splits off every digit, as SmolLM's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Numbers after a space must be merged by a tokenizer that does not split them off.
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def permuted(weight, heads):
    """Return rotary weights in llama.cpp's order: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write(path, llama, tokenizer, pre="smollm", architecture="llama", q8=False):
    config = llama.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        if "q_proj" in name:
            array = permuted(array, HEADS)
        if "k_proj" in name:
            array = permuted(array, KEY_HEADS)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        kind = gguf.GGMLQuantizationType.Q8_0
        if q8 and array.ndim == 2:
            array = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, array, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_config_and_template_are_those_of_the_model(tmp_path, llama, tokenizer):
    file = write(tmp_path / "tiny.gguf", llama, tokenizer)
    assert unpack_gguf(file, tmp_path / "model") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = llama.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids).logits, llama(ids).logits)
    assert not hasattr(loaded.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TEMPLATE


def test_token_ids_are_those_of_the_tokenizer(tmp_path, llama, tokenizer):
    unpack_gguf(write(tmp_path / "tiny.gguf", llama, tokenizer), tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded(TEXT).input_ids == tokenizer.encode(TEXT).ids
    # The test can fail: GPT-2's pre-tokenizer gives other ids.
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert loaded(TEXT).input_ids != tokenizer.encode(TEXT).ids


def test_unknown_pre_tokenizer_is_reported(tmp_path, llama, tokenizer):
    file = write(tmp_path / "tiny.gguf", llama, tokenizer, pre="from-the-future")
    (note,) = unpack_gguf(file, tmp_path / "model")
    assert "'from-the-future' is not known" in note


def test_8_bit_files_are_exact_in_float32(tmp_path, llama, tokenizer):
    file = write(tmp_path / "tiny.gguf", llama, tokenizer, q8=True)
    unpack_gguf(file, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    weight = llama.model.layers[0].mlp.down_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    restored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert np.array_equal(loaded.model.layers[0].mlp.down_proj.weight.detach().numpy(), restored)


def test_convert_reads_gguf(tmp_path, llama, tokenizer, monkeypatch, capsys):
    file = write(tmp_path / "tiny.gguf", llama, tokenizer)
    arguments = [
        "gptj8",
        "convert",
        str(file),
        str(tmp_path / "out" / "8bit"),
        "--block-size",
        "64",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "relative RMS error" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["8bit"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "8bit", dtype=torch.float32)
    ids = torch.arange(40)[None]
    assert torch.allclose(loaded(ids).logits, llama(ids).logits, atol=0.05)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:4], "cannot be read"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"PK" + data[2:], "not a GGUF file"),
        (lambda data: b"", "not a GGUF file"),
        (lambda data: data.replace(b"llama", b"lamma"), "cannot be read"),
    ],
    ids=["magic-only", "half", "zip", "empty", "unknown-architecture"],
)
def test_damaged_files_raise_one_line_and_write_nothing(tmp_path, llama, tokenizer, spoil, reason):
    file = write(tmp_path / "tiny.gguf", llama, tokenizer)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=reason) as raised:
        unpack_gguf(file, tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_random_damage_raises_one_line(tmp_path, llama, tokenizer):
    file = write(tmp_path / "tiny.gguf", llama, tokenizer)
    whole = file.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for at in generator.sample(range(4, 3000), 3):
            data[at] = generator.randrange(256)
        file.write_bytes(data)
        try:
            unpack_gguf(file, tmp_path / "model")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_one_part_of_several_is_refused(tmp_path, llama, tokenizer):
    file = write(tmp_path / "tiny-00001-of-00003.gguf", llama, tokenizer)
    with pytest.raises(UserError, match="one of 3 parts"):
        unpack_gguf(file, tmp_path / "model")


def test_a_failed_conversion_leaves_no_folders(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but nothing more")
    target = tmp_path / "new" / "folder" / "8bit"
    arguments = ["gptj8", "convert", str(tmp_path / "broken.gguf"), str(target)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "broken.gguf cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
