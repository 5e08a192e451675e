"""Stage `export`: the adapter, ready to hand over, proven equal to what was trained.

python -m stages.export
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.params.sections import Params, load_params, resolved
from gptj8.runtime.files import read_json, replace_directory, write_json
from gptj8.runtime.process import run
from gptj8.runtime.story import Story
from gptj8.tracking.journal import flatten
from gptj8.tracking.stage import stage_run
from gptj8.tracking.stage_results import REPORTS, STAGES

if TYPE_CHECKING:
    import torch

DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
ADAPTER = Path("artifacts/adapter")
OUTPUT = Path("artifacts/export")
REPORT = REPORTS / "export"


def main() -> None:
    """Collect, compare what a new process loads with what was trained, and only then put it in
    place; register it where that is asked for."""
    story = Story("export")
    params = load_params()
    story.say(
        f"{ADAPTER} with its evidence, and the answers of a new process beside the trained model's"
    )
    with stage_run("export", params) as record:
        from gptj8.evaluation.gate import require_all
        from gptj8.export.bundle import (
            adapter_bytes,
            collect,
            describe,
            describe_dataset,
            require_same_answers,
        )
        from gptj8.export.reference_answers import compare_in_fresh_process
        from gptj8.model.loading import pick_device, pick_dtype

        device = pick_device()
        dtype = pick_dtype(params.model.dtype, device)
        earlier = STAGES[: STAGES.index("export")]
        measured = {s: flatten(read_json(REPORTS / s / "metrics.json"), "/") for s in earlier}
        require = params.evaluate.require
        # What is known is asked before a large model is loaded and merged.
        require_all([text for text in require if "export/" not in text], measured)
        dataset = describe_dataset(DATASET, REPORTS / "validate" / "inputs.json")
        with replace_directory(OUTPUT) as staging:
            collect(ADAPTER, BASE, staging)
            compared = compare_in_fresh_process(ADAPTER, BASE, staging, dtype, device)
            require_same_answers(compared, "the export")
            metrics = {"adapter_bytes": adapter_bytes(staging), **compared}
            if params.export.merge:
                metrics |= _merge(params, staging, dtype, device)
            measured["export"] = metrics
            require_all(require, measured)
            describe(staging, resolved(params), measured, dataset)
        write_json(REPORT / "metrics.json", metrics)
        name = params.tracking.registered_model_name
        if name:
            from gptj8.serving.registry import register_export

            version = register_export(record.open_run, name, BASE, OUTPUT, measured)
            story.say(f"registered as version {version} of {name}")
    story.end(
        f"{metrics['identical_generations']:.0f} of {metrics['compared_prompts']:.0f} prompts "
        f"answered alike, logits differ by {metrics['max_logit_difference']:.2g} ({OUTPUT})"
    )


def _merge(
    params: Params, staging: Path, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Write the merged model and return what it differs by."""
    import pandas as pd
    import torch

    from gptj8.dataset.prepared.dataset import load_prepared
    from gptj8.dataset.prepared.prompts import TextEncoder
    from gptj8.evaluation.suite import held_out_documents
    from gptj8.export.bundle import MERGED, merge, perplexity_against_tuned, require_same_answers
    from gptj8.export.reference_answers import compare_in_fresh_process
    from gptj8.model.loading import load_model

    merged = staging / MERGED
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    merge(BASE, ADAPTER, merged, half)
    compared = compare_in_fresh_process(ADAPTER, merged, None, dtype, device)
    require_same_answers(compared, "the merged model")
    dataset, settings = load_prepared(DATASET), params.evaluate
    _, documents = held_out_documents(
        dataset.task,
        dataset.split("test"),
        dataset.prompt_encoder(TextEncoder.load(BASE), params.data.max_length),
        path=settings.perplexity_text,
        text_column=params.data.text_column,
        limit=settings.max_perplexity_documents,
    )
    ratio = perplexity_against_tuned(
        load_model(merged, dtype, device),
        documents,
        pd.read_csv(REPORTS / "evaluate" / "perplexity.csv")["tuned_nll"].to_numpy(),
        batch_size=settings.per_device_eval_batch_size,
        resamples=settings.bootstrap_resamples,
        seed=params.seed,
    )
    return {
        "merged_logit_difference": compared["max_logit_difference"],
        "merged_identical_generations": compared["identical_generations"],
        "merged_perplexity_ratio": ratio.value,
        "merged_perplexity_ratio_low": ratio.low,
        "merged_perplexity_ratio_high": ratio.high,
    }


if __name__ == "__main__":
    run(main, computes=True)
