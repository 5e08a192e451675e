"""What the trained model answered before it was saved, so that a copy can be proven equal.

Adapters have been exported that differ from what was trained. So the training process itself writes
logits of a few prompts beside the adapter, and whoever reloads the adapter computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gptj8.errors import UserError

REFERENCE_FILE = "reference_logits.safetensors"

PROMPTS = 32
"""How many prompts are compared."""


@torch.inference_mode()
def prompt_logits(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits after each prompt: float32 (prompts, vocabulary).

    One prompt at a time, without padding, so that the numbers do not depend on their company.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = [
        model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, -1].float().cpu()
        for ids in prompts
    ]
    return torch.stack(rows)


def save_reference(
    folder: str | Path, model: torch.nn.Module, prompts: Sequence[Sequence[int]]
) -> None:
    """Write prompts and their logits into an adapter's folder."""
    tensors = {"logits": prompt_logits(model, prompts)}
    tensors |= {f"prompt.{i:03d}": torch.tensor(list(ids)) for i, ids in enumerate(prompts)}
    save_file(tensors, Path(folder) / REFERENCE_FILE)


def max_logit_difference(folder: str | Path, model: torch.nn.Module) -> float:
    """Return the largest absolute difference between the saved logits and the model's own.

    Raises:
        UserError: if the folder holds no reference.
    """
    file = Path(folder) / REFERENCE_FILE
    if not file.is_file():
        raise UserError(f"{file} does not exist; rerun finetune")
    tensors = load_file(file)
    expected = tensors.pop("logits")
    prompts = [tensors[name].tolist() for name in sorted(tensors)]
    return float((prompt_logits(model, prompts) - expected).abs().max())
