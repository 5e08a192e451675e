"""Compare a saved model's answers with the reference answers, using only transformers and PEFT.

    python -P replay.py MODEL REFERENCE [--adapter DIR] [--dtype NAME] [--device NAME]

prints `<prompts done> of <prompts>` after each prompt. The last line is JSON: the differences
between the answers of the saved model, loaded by this process, and those of the trained model
before it was saved. This file is run by its path and imports no other module of this package,
because a merged model must load where the package is not installed. The only exception is the
import that registers the 8-bit format.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 16
"""Maximum number of tokens to compare per answer."""


@torch.inference_mode()
def answer(
    model: Any, prompt: Sequence[int], end_ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits after the prompt and the greedy continuation.

    Prompts are not batched or padded, so the numbers do not depend on other prompts.

    Returns:
        Logits, float32 (vocabulary,), and new tokens, int64 (at most `NEW_TOKENS`,), including the
        end token.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0][0].float().cpu(), output.sequences[0, ids.shape[1] :].cpu()


def read_reference(
    file: Path,
) -> tuple[list[list[int]], torch.Tensor, list[list[int]], list[int]]:
    """Return prompts, logits (float32, (prompts, vocabulary)), continuations and end tokens."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    logits, end_ids = tensors.pop("logits"), tensors.pop("eos_id").reshape(-1).tolist()
    names = sorted({name.split(".")[1] for name in tensors})
    prompts = [tensors[f"prompt.{name}"].tolist() for name in names]
    return prompts, logits, [tensors[f"answer.{name}"].tolist() for name in names], end_ids


def compare(
    model: Any, reference: Path, tell: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, float]:
    """Return `max_logit_difference`, `compared_prompts` and `identical_generations`.

    Args:
        model: The loaded model.
        reference: File with the reference answers.
        tell: Called with the number of prompts done and the total number.
    """
    prompts, logits, continuations, end_ids = read_reference(reference)
    model.eval()
    difference, identical, done = 0.0, 0, 0
    for prompt, expected, tokens in zip(prompts, logits, continuations, strict=True):
        found, new = answer(model, prompt, end_ids)
        if not (found.isfinite().all() and expected.isfinite().all()):
            raise ValueError("logits are not finite; try model.dtype: float32")
        difference = max(difference, float((found - expected).abs().max()))
        identical += new.tolist() == tokens
        done += 1
        tell(done, len(prompts))
    return {
        "max_logit_difference": difference,
        "compared_prompts": len(prompts),
        "identical_generations": identical,
    }


def load(model: str, adapter: str | None, dtype: str, device: str) -> Any:
    """Load a model as any user would, with only `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        import gptj8  # noqa: F401  # registers the 8-bit format with transformers
    placement = {"device_map": "auto"} if device == "cuda" else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **placement)
    if adapter is None:
        return loaded
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, adapter)


def main() -> None:
    """Compare a saved model with the reference answers and print the result as JSON."""
    parser = argparse.ArgumentParser(description="compare a saved model with the trained one")
    parser.add_argument("model")
    parser.add_argument("reference")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = load(given.model, given.adapter, given.dtype, given.device)
    tell = lambda done, total: print(done, "of", total, flush=True)  # noqa: E731
    print(json.dumps(compare(model, Path(given.reference), tell)))


if __name__ == "__main__":
    main()
