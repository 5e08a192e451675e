"""Write the export's README: a model card in the Hugging Face Hub's format, with the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj8.evaluation.systems import BASELINE, FEW_SHOT, ORIGINAL, QUANTIZED, TUNED, own_first
from gptj8.runtime.files import read_json
from gptj8.runtime.messages import counted
from gptj8.runtime.project import BASE, EXPORT

_METRICS = {  # metric of stage evaluate -> the Hub's metric type
    f"{TUNED}/accuracy": "accuracy",
    f"{TUNED}/macro_f1": "f1",
    f"{TUNED}/exact_match": "exact_match",
    f"{TUNED}/perplexity": "perplexity",
}
_COLUMNS = {
    "accuracy": "the fraction of rows whose most likely label is correct",
    "macro_f1": "the mean F1 score over all labels",
    "exact_match": "the fraction of generated answers that equal the expected answer",
    "perplexity": "measured per token of held-out text",
    "kl_divergence": "how far the next-token distribution is from that of the original model, in "
    "nats per token; 0 is equal",
    "top1_agreement": "the fraction of tokens for which the most likely next token is that of the "
    "original model",
}
_TASKS = {"classification": "text-classification"}
_SYSTEMS = {
    ORIGINAL: "the original model, not quantized",
    QUANTIZED: "the 8-bit base model",
    FEW_SHOT: "the 8-bit base model with solved examples before each prompt",
    BASELINE: "TF-IDF with logistic regression, fitted on the same rows",
    TUNED: "the 8-bit base model with this adapter",
}


def model_card(
    params: Mapping[str, Any], metrics: Mapping[str, Any], dataset: Mapping[str, Any]
) -> str:
    """Return the text of the model card.

    Args:
        params: Resolved params.
        metrics: Stage -> flat name -> value.
        dataset: Content of the export's dataset.json; `files` and `prepared` (digests) are
            optional.
    """
    from huggingface_hub import EvalResult, ModelCardData

    data, finetune = params["data"], params["finetune"]
    model = Path(params["model"]["path"])
    base, _ = hub_name(model)
    if base != str(model):
        of = base.rpartition("/")[2]
    else:
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
        base_model=base,
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

Trained with gptj8 on `{data["train"]}` (task: {data["task"]}). The large weights of the base model
are frozen and quantized to 8 bits (block-wise, block size {quantization["block_size"]}, codebook
{quantization["codebook"]}).

## Use

```python
import gptj8  # registers the 8-bit format with transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{BASE}")
model = PeftModel.from_pretrained(base, "{EXPORT}")
```

The adapter also works on the original model, with PEFT alone:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{EXPORT}")
```

{_prompts(data, dataset)}

## Evaluation

{_results(evaluation, dataset)}

{_equality(metrics.get("export", {}))}

## Training

```json
{settings}
```

Seed {params["seed"]}. {_digests(dataset)}

The adapter repeats the errors and biases of its training rows. It was evaluated only on held-out
rows from the same source.
"""
    return f"---\n{card_data.to_yaml()}\n---\n{body}"


def _prompts(data: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    if not dataset.get("chat"):
        return (
            f"The prompt template is {json.dumps(data['prompt_template'])}. The answer follows "
            "after a space, unless the template ends with white space."
        )
    return f"""Conversations are written with `chat_template.jinja`:

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{EXPORT}")
messages = [{{"role": "user", "content": "Hello!"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
```"""


def hub_name(model: Path) -> tuple[str, str | None]:
    """Return the Hub id and revision that a model was downloaded from, or its path and None."""
    source = model / "source.json"
    if source.is_file():
        content = read_json(source)
        if isinstance(content, dict) and content.get("repo"):
            return str(content["repo"]), content.get("revision")
    return str(model), None


def _results(evaluation: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    if not evaluation:
        return "This adapter was not evaluated."
    rows = dataset.get("rows", {}).get("test")
    of = f"{counted(rows, 'row')} of the test split" if isinstance(rows, int) else "the test split"
    ranges = any(key.endswith("_low") for key in evaluation)
    interval = ", with 95 % confidence intervals" if ranges else ""
    return f"Results on {of}{interval}:\n\n{_systems_table(evaluation)}\n\n{_meanings(evaluation)}"


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
        "Loaded with transformers and PEFT in a new process, the adapter generates the same tokens "
        f"as the trained model for {same:.0f} of {prompts:.0f} prompts. Logits differ by at most "
        f"{export['max_logit_difference']:.3g}."
    )
    if "merged_perplexity_ratio" not in export:
        return text
    ratio = f"{export['merged_perplexity_ratio']:.5f}"
    return (
        f"{text} `merged/` is a 16-bit model with the adapter merged into its weights, and needs "
        "only transformers. It generates the same tokens for "
        f"{export['merged_identical_generations']:.0f} of {prompts:.0f} prompts, and its "
        f"perplexity is {ratio} times that of the unmerged model."
    )


def _digests(dataset: Mapping[str, Any]) -> str:
    files = dataset.get("files", [])
    named = ", ".join(f"`{item['path']}` (MD5 {item['md5']})" for item in files)
    return f"Rows were read from {named}." if named else ""
