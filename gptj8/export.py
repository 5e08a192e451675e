"""The deliverable: an adapter with everything that someone else needs to use and to judge it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptj8.errors import UserError
from gptj8.files import list_files, write_json
from gptj8.models import load_adapter, load_model
from gptj8.reference import max_logit_difference

MERGED = "merged"

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def collect(
    adapter: Path, base: Path, folder: Path, params: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Fill `folder` with the adapter, the tokenizer, the params, the metrics and a model card.

    Args:
        adapter: as `PeftModel.save_pretrained` wrote it.
        base: the converted base model, for its tokenizer.
        params: the resolved params, for the record and the card.
        metrics: by stage, what the stages measured.

    Raises:
        UserError: if the adapter is incomplete.
    """
    for name in _ADAPTER_FILES:
        if not (adapter / name).is_file():
            raise UserError(f"{adapter} has no {name}; rerun finetune")
        shutil.copyfile(adapter / name, folder / name)
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_json(folder / "params.json", params)
    write_json(folder / "metrics.json", metrics)
    (folder / "README.md").write_text(model_card(params, metrics), encoding="utf-8")


def adapter_bytes(folder: Path) -> int:
    """Return the size of what a user of the adapter downloads, without a merged model."""
    return sum(f.stat().st_size for f in list_files(folder) if MERGED not in f.parts)


def compare_with_trained(
    exported: Path, adapter: Path, base: Path, dtype: torch.dtype, device: torch.device
) -> float:
    """Load the export from disk and compare it with what the trained model answered.

    Returns:
        the largest absolute logit difference over the reference prompts; 0.0 on the machine that
        trained.
    """
    model = load_adapter(load_model(base, dtype, device), exported)
    return max_logit_difference(adapter, model)


def merge(exported: Path, base: Path, adapter: Path, device: torch.device) -> float:
    """Write a 16-bit model with the adapter merged into it, which needs nothing but transformers.

    The base is restored to float32 and merged there, because a merge into 8 bits would round the
    adapter away; weights are then saved in 16 bits.

    Returns:
        the largest absolute logit difference to the trained model over the reference prompts.
    """
    # On the CPU: float32 weights are four times what the GPU was chosen for.
    cpu = torch.device("cpu")
    restored = load_model(base, torch.float32, cpu).dequantize(torch.float32)
    merged = load_adapter(restored, exported).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(exported / MERGED)
    for name in _TOKENIZER_FILES:
        if (exported / name).is_file():
            shutil.copyfile(exported / name, exported / MERGED / name)
    return max_logit_difference(adapter, load_model(exported / MERGED, torch.bfloat16, device))


def model_card(params: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return a model card in the Hub's format."""
    from huggingface_hub import ModelCardData

    data, finetune = params["data"], params["finetune"]
    card_data = ModelCardData(
        base_model=params["model"]["path"],
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["gptj8", "8-bit", finetune["method"]],
    )
    evaluation = metrics.get("evaluate", {})
    rows = "\n".join(f"| {key} | {_number(value)} |" for key, value in evaluation.items())
    settings = json.dumps(finetune, indent=2)
    template = json.dumps(data["prompt_template"])
    body = f"""
# {finetune["method"]} adapter for {params["model"]["path"]}

Trained with gptj8 on `{data["train"]}` ({data["task"]}), on a base whose large weights are frozen
in 8 bits (block-wise, block size {params["quantization"]["block_size"]}, codebook
{params["quantization"]["codebook"]}).

## Use

```python
import gptj8  # lets transformers read the 8-bit base
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("artifacts/base-8bit")
model = PeftModel.from_pretrained(base, "artifacts/export")
```

A prompt is {template}, and the answer follows after a space.

## Evaluation

| metric | value |
|---|---|
{rows}

The share of held-out rows answered right is `accuracy`; `perplexity` is per token of held-out text.
`base` is the original model, `quantized` its 8-bit copy, `tuned` the copy with this adapter.

## Training

```json
{settings}
```

Seed {params["seed"]}. The adapter knows what its training rows said and repeats their errors and
biases; it was measured on held-out rows of the same source only.
"""
    return f"---\n{card_data.to_yaml()}\n---\n{body}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
