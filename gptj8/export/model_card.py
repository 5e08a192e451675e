"""The export's README: a model card in the Hub's format, with what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.evaluation.systems import BASELINE, FEW_SHOT, ORIGINAL, QUANTIZED, TUNED, own_first

_METRICS = {  # of evaluate: what the Hub calls it
    f"{TUNED}/accuracy": "accuracy",
    f"{TUNED}/macro_f1": "f1",
    f"{TUNED}/exact_match": "exact_match",
    f"{TUNED}/perplexity": "perplexity",
}
_COLUMNS = {
    "accuracy": "the share of rows whose likeliest label is the right one, with its 95 % interval",
    "macro_f1": "the mean of all labels' F1",
    "exact_match": "the share of answers that are right as the model wrote them",
    "perplexity": "per token of held-out text",
}
_TASKS = {"classification": "text-classification"}
_SYSTEMS = {
    ORIGINAL: "the original model, unquantized",
    QUANTIZED: "its 8-bit copy",
    FEW_SHOT: "the 8-bit copy with solved examples before each prompt",
    BASELINE: "TF-IDF and logistic regression, fitted on the same rows",
    TUNED: "the 8-bit copy with this adapter",
}


def model_card(
    params: Mapping[str, Any], metrics: Mapping[str, Any], dataset: Mapping[str, Any]
) -> str:
    """Return the card.

    Args:
        params: resolved.
        metrics: stage -> flat name -> value.
        dataset: as it lies beside the card, with `files` and `prepared` (digests) where known.
    """
    from huggingface_hub import EvalResult, ModelCardData

    data, finetune = params["data"], params["finetune"]
    model = Path(params["model"]["path"])
    of = model.parent.name if model.name == "model" else model.name
    name = f"{finetune['method']} adapter for {of}"
    evaluation = metrics.get("evaluate", {})
    results = [
        EvalResult(
            task_type=_TASKS.get(data["task"], "text-generation"),
            dataset_type="local",
            dataset_name=data["train"],
            dataset_split="test",
            metric_type=kind,
            metric_value=evaluation[key],
        )
        for key, kind in _METRICS.items()
        if key in evaluation
    ]
    card_data = ModelCardData(
        base_model=params["model"]["path"],
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["gptj8", "8-bit", finetune["method"]],
        model_name=name,
        eval_results=results or None,
    )
    settings = json.dumps(finetune, indent=2)
    quantization = params["quantization"]
    body = f"""
# {name}

Trained with gptj8 on `{data["train"]}` ({data["task"]}), on a base whose large weights are frozen
in 8 bits (block-wise, block size {quantization["block_size"]}, codebook
{quantization["codebook"]}).

## Use

```python
import gptj8  # lets transformers read the 8-bit base
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("artifacts/base-8bit")
model = PeftModel.from_pretrained(base, "artifacts/export")
```

A prompt is {json.dumps(data["prompt_template"])}, and the answer follows after a space.

## Evaluation

On the {_count(dataset)} rows of the test split:

{_systems_table(evaluation)}

{_meanings(evaluation)}

{_equality(metrics.get("export", {}))}

## Training

```json
{settings}
```

Seed {params["seed"]}. {_digests(dataset)}

The adapter knows what its training rows said and repeats their errors and biases; it was measured
on held-out rows of the same source only.
"""
    return f"---\n{card_data.to_yaml()}\n---\n{body}"


def _systems_table(evaluation: Mapping[str, Any]) -> str:
    found = dict.fromkeys(key.partition("/")[0] for key in evaluation if "/" in key)
    systems = own_first(found)
    known = [c for c in _COLUMNS if any(f"{s}/{c}" in evaluation for s in systems)]
    lines = [f"| system | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    for system in systems:
        cells = [_with_interval(evaluation, f"{system}/{column}") for column in known]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(evaluation: Mapping[str, Any], key: str) -> str:
    if key not in evaluation:
        return ""
    value = f"{evaluation[key]:.4g}"
    if f"{key}_low" not in evaluation:
        return value
    return f"{value} ({evaluation[f'{key}_low']:.4g} to {evaluation[f'{key}_high']:.4g})"


def _meanings(evaluation: Mapping[str, Any]) -> str:
    parts = {part for key in evaluation for part in key.split("/")}
    known = {**_COLUMNS, **_SYSTEMS}.items()
    return "; ".join(f"`{name}` is {meaning}" for name, meaning in known if name in parts) + "."


def _equality(export: Mapping[str, float]) -> str:
    if "compared_prompts" not in export:
        return ""
    same, prompts = export["identical_generations"], export["compared_prompts"]
    text = (
        f"Loaded by a new process with transformers and PEFT alone, it continues {same:.0f} of "
        f"{prompts:.0f} prompts by the tokens of the trained model; logits differ by at most "
        f"{export['max_logit_difference']:.3g}."
    )
    if "merged_perplexity_ratio" not in export:
        return text
    ratio = f"{export['merged_perplexity_ratio']:.5f}"
    return (
        f"{text} `merged/` is a 16-bit model with the adapter in it, which needs transformers "
        f"alone: {export['merged_identical_generations']:.0f} of {prompts:.0f} prompts, perplexity "
        f"{ratio} times the unmerged one's."
    )


def _count(dataset: Mapping[str, Any]) -> str:
    rows = dataset.get("rows", {}).get("test")
    return f"{rows:,}" if isinstance(rows, int) else ""


def _digests(dataset: Mapping[str, Any]) -> str:
    files = dataset.get("files", [])
    named = ", ".join(f"`{item['path']}` (MD5 {item['md5']})" for item in files)
    return f"Rows were read from {named}." if named else ""
