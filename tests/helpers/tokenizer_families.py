"""Small tokenizers with the normalizers and pre-tokenizers of well-known models, as directories."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers import processors as post

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Label: positive, negative, neutral",
    'def add(a, b):\n    """Add two numbers."""\n    total = a + b\n    return total\n\n\n',
    "### Instruction:\nSay it.\n\n### Response:\nIt is said. Good bye! 1234 and 98.6",
    "user: How are you?\nassistant: Fine, thank you.\nsystem: Be brief.\nmodel assistant user",
    "Größe naïve café 東京 Москва",
] * 40

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# family: class in tokenizer_config.json, BOS, EOS, other special tokens, model type
FAMILIES = {
    "gpt2": ("GPT2Tokenizer", None, "<|endoftext|>", (), "gpt2"),
    "llama2": ("LlamaTokenizer", "<s>", "</s>", ("<unk>",), "llama"),
    "llama3": (
        "PreTrainedTokenizerFast",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        "llama",
    ),
    "mistral": ("LlamaTokenizer", "<s>", "</s>", ("<unk>", "[INST]", "[/INST]"), "mistral"),
    "qwen2": ("Qwen2Tokenizer", None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "qwen2"),
    "gemma": (
        "GemmaTokenizer",
        "<bos>",
        "<eos>",
        ("<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
        "gemma",
    ),
    "smollm": (
        "GPT2Tokenizer",
        "<|im_start|>",
        "<|im_end|>",
        ("<|endoftext|>",),
        "llama",
    ),
}


def write_family(name: str, folder: Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json and config.json of a family."""
    kind, bos, eos, others, model_type = FAMILIES[name]
    special = [token for token in (*others, bos, eos) if token]
    is_sentencepiece = name in ("llama2", "mistral", "gemma")
    tokenizer = (_sentencepiece if is_sentencepiece else _byte_level)(name, special)
    if bos and name != "smollm":
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = post.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[pair]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>" if is_sentencepiece else eos}
    config = {"tokenizer_class": kind, **{k: v for k, v in names.items() if v}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": size}))
    return folder


def _byte_level(name: str, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre.ByteLevel(add_prefix_space=False)
    split = {"llama3": _LLAMA3, "qwen2": _QWEN2}.get(name)
    if split:
        parts = [pre.Split(Regex(split), "isolated"), pre.ByteLevel(False, use_regex=False)]
        level = pre.Sequence(parts)
    elif name == "smollm":
        level = pre.Sequence([pre.Digits(individual_digits=True), level])
    tokenizer.pre_tokenizer = level
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post.ByteLevel(trim_offsets=True)
    alphabet = pre.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def _sentencepiece(name: str, special: list[str]) -> Tokenizer:
    """A BPE on text whose spaces are marked, with bytes for unknown characters."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre.Sequence([pre.Split("\n", "isolated"), pre.Metaspace()])
    learner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=[], show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokens += [] if "▁" in tokens else ["▁"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if name == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    elif name == "llama2":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer
