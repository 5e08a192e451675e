"""Stage `evaluate`: what 8 bits cost and what fine-tuning brought.

python -m stages.evaluate
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.errors import UserError
from gptj8.files import write_json
from gptj8.params import Params, load_params
from gptj8.runtime import peak_memory_gib, run
from gptj8.tracking import REPORTS, stage_run

if TYPE_CHECKING:
    import pandas as pd

    from gptj8.evaluation.suite import Documents
    from gptj8.prompts import PromptEncoder

DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
ADAPTER = Path("artifacts/adapter")
REPORT = REPORTS / "evaluate"


def main() -> None:
    """Measure the original model, the 8-bit one and the tuned one on the same held-out rows."""
    params = load_params()
    with stage_run("evaluate", params):
        from transformers import AutoConfig

        from gptj8.dataset import load_prepared
        from gptj8.evaluation.baseline import predict_with_tfidf
        from gptj8.evaluation.few_shot import few_shot_prompts
        from gptj8.evaluation.perplexity import context_length
        from gptj8.evaluation.report import write_reports
        from gptj8.evaluation.suite import compare_on
        from gptj8.models import load_adapter, load_model, pick_device, pick_dtype
        from gptj8.prompts import PromptEncoder, TextEncoder

        started = time.perf_counter()
        dataset = load_prepared(DATASET)
        train, test, labels = dataset.split("train"), dataset.split("test"), dataset.labels
        encoder, template = TextEncoder.load(BASE), dataset.prompt_template
        context = context_length(AutoConfig.from_pretrained(str(BASE)))
        length, side = min(params.data.max_length, context), dataset.truncation_side
        prompts = PromptEncoder(encoder, template, length, side)
        rows, documents = _documents(params, dataset.task, test, prompts)
        shots = params.evaluate.few_shot if labels else 0
        if shots:  # before anything is measured: it refuses examples that do not fit
            whole = PromptEncoder(encoder, template, context, side)
            solved = few_shot_prompts(
                test["text"], train, labels, whole, count=shots, seed=params.seed
            )
        batch_size = params.evaluate.per_device_eval_batch_size
        comparison = compare_on(test, labels, prompts, documents, batch_size)
        if labels:
            baseline = predict_with_tfidf(train["text"], train["label"], test["text"])
            comparison.predictions["baseline"] = baseline

        device = pick_device()
        dtype = pick_dtype(params.model.dtype, device)
        # The original is not kept: memory holds a single model at a time.
        comparison.measure("base", load_model(params.model.path, dtype, device))
        model = load_model(BASE, dtype, device)
        comparison.measure("quantized", model)
        if shots:
            comparison.classify("few_shot", model, solved)
        comparison.measure("tuned", load_adapter(model, ADAPTER))

        actual = test["label"] if labels else []
        metrics = comparison.metrics(actual, params.evaluate.bootstrap_resamples, params.seed)
        write_reports(REPORT, test, rows, labels, comparison.predictions, comparison.scores)
        metrics["peak_memory_gib"] = peak_memory_gib()
        metrics["seconds"] = time.perf_counter() - started
        write_json(REPORT / "metrics.json", metrics)
        shown = {k: v for k, v in metrics.items() if k.endswith(("/perplexity", "/accuracy"))}
        print("evaluate: " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))


def _documents(
    params: Params, task: str, test: pd.DataFrame, prompts: PromptEncoder
) -> tuple[pd.DataFrame, Documents]:
    """Return the rows that perplexity is measured on, and their tokens."""
    from gptj8.evaluation.suite import Documents
    from gptj8.formats import read_rows

    path, limit = params.evaluate.perplexity_text, params.evaluate.max_perplexity_documents
    if path is None and task == "completion":
        rows = test.head(limit or len(test))
        pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
        return rows, Documents.of_completions(pairs, prompts)
    rows = test if path is None else read_rows(path, {"text": params.data.text_column})
    rows = rows[rows["text"].fillna("").str.strip() != ""].head(limit or len(rows))
    if rows.empty:
        raise UserError(f"evaluate.perplexity_text = {path} has no text")
    return rows, Documents.of_texts(rows["text"], prompts.encoder)


if __name__ == "__main__":
    run(main)
