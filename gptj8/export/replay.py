"""What a model answers to a few prompts, with transformers and PEFT alone.

    python -P replay.py MODEL REFERENCE [--adapter DIR] [--dtype NAME] [--device NAME]

prints `<prompts done> of <prompts>` after each prompt, and last, as JSON, how the answers of a
saved model, loaded by this process, differ from those that the trained one gave before it was
saved. Nothing here is of this package but the line that lets transformers read an 8-bit base: a
merged model must load where the package is not installed, so this file is run by its path and
imports no neighbour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 16
"""At most so many tokens of an answer are compared."""


@torch.inference_mode()
def answer(model: Any, prompt: Sequence[int], eos_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits behind the prompt, float32 (vocabulary,), and the likeliest continuation,
    int64 (at most `NEW_TOKENS`,), the end token included.

    One prompt at a time, without padding, so that the numbers do not depend on their company.
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
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0][0].float().cpu(), output.sequences[0, ids.shape[1] :].cpu()


def read_reference(file: Path) -> tuple[list[list[int]], torch.Tensor, list[list[int]], int]:
    """Return prompts, logits float32 (prompts, vocabulary), continuations and the end token."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    logits, eos_id = tensors.pop("logits"), int(tensors.pop("eos_id"))
    names = sorted({name.split(".")[1] for name in tensors})
    prompts = [tensors[f"prompt.{name}"].tolist() for name in names]
    return prompts, logits, [tensors[f"answer.{name}"].tolist() for name in names], eos_id


def compare(
    model: Any, reference: Path, tell: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, float]:
    """Return `max_logit_difference`, `compared_prompts` and `identical_generations`.

    Args:
        tell: called with the number of prompts that are done, and of all.
    """
    prompts, logits, continuations, eos_id = read_reference(reference)
    model.eval()
    difference, identical, done = 0.0, 0, 0
    for prompt, expected, tokens in zip(prompts, logits, continuations, strict=True):
        found, new = answer(model, prompt, eos_id)
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
    """Load as a stranger would: by `from_pretrained` and nothing else."""
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        import gptj8  # noqa: F401  # lets transformers read 8-bit models
    placement = {"device_map": "auto"} if device == "cuda" else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **placement)
    if adapter is None:
        return loaded
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, adapter)


def main() -> None:
    """Compare and print."""
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
