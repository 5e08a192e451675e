"""Save a model with random weights: `python -m benchmarks.opponents.originals SHAPE FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.opponents.shapes import Shape, word


def save(shape: Shape, folder: Path) -> None:
    """Save a model in bfloat16, always with the same weights, and a tokenizer of made-up words.

    The tokenizer only has to exist: converters of other systems read it.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape.config())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<|endoftext|>": 0} | {word(i): i for i in range(1, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


if __name__ == "__main__":
    save(Shape(**json.loads(sys.argv[1])), Path(sys.argv[2]))
