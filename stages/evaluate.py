"""Stage `evaluate`: what 8 bits cost and what fine-tuning brought.

python -m stages.evaluate
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.params.sections import Params, load_params
from gptj8.runtime.distributed import join, launch, leave
from gptj8.runtime.files import write_json
from gptj8.runtime.process import run
from gptj8.runtime.progress import format_seconds
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run
from gptj8.tracking.stage_results import REPORTS

if TYPE_CHECKING:
    import pandas as pd

    from gptj8.dataset.prepared.dataset import PreparedDataset
    from gptj8.dataset.prepared.prompts import PromptEncoder
    from gptj8.evaluation.suite import Comparison

DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
ADAPTER = Path("artifacts/adapter")
REPORT = REPORTS / "evaluate"


def main() -> None:
    """Measure the original model, the 8-bit one and the tuned one on the same held-out rows."""
    params = load_params()
    if launch(params.finetune.launcher, "stages.evaluate"):
        return
    story = Story("evaluate")
    with stage_run("evaluate", params):
        from gptj8.dataset.prepared.dataset import load_prepared
        from gptj8.evaluation.few_shot import few_shot_prompts
        from gptj8.evaluation.other_systems import read_predictions
        from gptj8.evaluation.report import write_classification_reports, write_reports
        from gptj8.evaluation.suite import Comparison, Questions, held_out_documents
        from gptj8.model.loading import (
            load_adapter,
            load_model,
            load_original,
            pick_device,
            pick_dtype,
        )

        started = time.perf_counter()
        settings = params.evaluate
        dataset = load_prepared(DATASET)
        train, test, labels = dataset.split("train"), dataset.split("test"), dataset.labels
        prompts, whole = _prompt_encoders(params, dataset)
        rows, documents = held_out_documents(
            dataset.task,
            test,
            prompts,
            path=settings.perplexity_text,
            text_column=params.data.text_column,
            limit=settings.max_perplexity_documents,
        )
        questions = Questions.of_rows(
            dataset.task,
            test,
            labels,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            max_generated_rows=settings.max_generated_rows,
        )
        comparison = Comparison(documents, questions, settings.per_device_eval_batch_size)
        # Before anything is measured: both refuse what cannot be.
        if settings.predictions is not None:
            outside = read_predictions(settings.predictions, test, labels)
            comparison.predictions.update(outside)
        shots = settings.few_shot if labels else 0
        if shots:
            solved = few_shot_prompts(
                test["text"], train, labels, whole, count=shots, seed=params.seed
            )
        systems = f"{params.model.path}, its 8-bit copy and the tuned model"
        asked = f", {len(labels)} labels" if labels else ""
        story.say(f"{systems}, {len(test):,} test rows{asked}")
        if labels:
            _measure_baseline(comparison, train, test)
            story.say(_result(comparison, "baseline"))

        join()
        device = pick_device()
        dtype = pick_dtype(params.model.dtype, device)
        with comparison.costing("base"):  # not kept: memory holds a single model at a time
            comparison.measure("base", load_original(params.model.path, BASE, dtype, device))
        story.say(_result(comparison, "base"))
        with comparison.costing("quantized"):
            model = load_model(BASE, dtype, device)
            comparison.measure("quantized", model)
        story.say(_result(comparison, "quantized"))
        if shots:
            with comparison.costing("few_shot"):
                comparison.ask("few_shot", model, solved)
            story.say(_result(comparison, "few_shot"))
        with comparison.costing("tuned"):
            comparison.measure("tuned", load_adapter(model, ADAPTER))
        story.say(_result(comparison, "tuned"))

        leave()
        resamples, seed = settings.bootstrap_resamples, params.seed
        metrics = comparison.metrics(resamples, seed)
        write_reports(
            REPORT,
            test,
            rows,
            labels,
            comparison.predictions,
            comparison.scores,
            comparison.generated,
        )
        write_classification_reports(
            REPORT,
            labels,
            questions.answers,
            comparison.predictions,
            comparison.likelihoods,
            resamples=resamples,
            seed=seed,
        )
        peaks = (value for key, value in metrics.items() if key.endswith("/peak_memory_gib"))
        metrics["peak_memory_gib"] = max(peaks)
        metrics["seconds"] = time.perf_counter() - started
        write_json(REPORT / "metrics.json", metrics)
    ratio = metrics["quantized/perplexity_ratio"]
    story.end(f"8-bit perplexity {ratio:.5f} of the original's ({REPORT})")


def _result(comparison: Comparison, system: str) -> str:
    """Return in a line what was measured of one system."""
    parts = []
    if system in comparison.scores:
        parts.append(f"perplexity {comparison.scores[system].perplexity:.3f}")
    if system in comparison.predictions:
        is_right = comparison.predictions[system] == list(comparison.questions.answers)
        parts.append(f"accuracy {is_right.mean():.1%}")
    elif system in comparison.generated:
        parts.append(f"{len(comparison.generated[system]):,} answers")
    took = format_seconds(comparison.costs[f"{system}/seconds"])
    name = "baseline (TF-IDF)" if system == "baseline" else system
    return f"{name}: {', '.join(parts)}; {took}"


def _prompt_encoders(
    params: Params, dataset: PreparedDataset
) -> tuple[PromptEncoder, PromptEncoder]:
    """Return an encoder of prompts as they were trained on, and one with all of the context."""
    from transformers import AutoConfig

    from gptj8.dataset.prepared.prompts import TextEncoder
    from gptj8.model.scoring.perplexity import context_length

    context = context_length(AutoConfig.from_pretrained(str(BASE)))
    encoder = TextEncoder.load(BASE)
    trained = dataset.prompt_encoder(encoder, min(params.data.max_length, context))
    return trained, dataset.prompt_encoder(encoder, context)


def _measure_baseline(comparison: Comparison, train: pd.DataFrame, test: pd.DataFrame) -> None:
    from gptj8.evaluation.baseline import predict_with_tfidf

    with comparison.costing("baseline"):
        predicted = predict_with_tfidf(train["text"], train["label"], test["text"])
        comparison.predictions["baseline"] = predicted


if __name__ == "__main__":
    run(main, computes=True)
