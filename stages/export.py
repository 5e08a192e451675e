"""Stage `export`: export the adapter and check that it equals the trained model.

python -m stages.export
"""

from __future__ import annotations

from pathlib import Path

from gptj8.params.sections import load_params, resolved
from gptj8.runtime.files import replace_directory, write_json
from gptj8.runtime.process import run
from gptj8.runtime.project import ADAPTER, BASE, DATASET, EXPORT, REPORTS, STAGES
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run
from gptj8.tracking.stage_results import measured_by


def main() -> None:
    """Assemble the export, compare it with the trained model in a new process, and publish it.

    The export is registered in MLflow if `tracking.registered_model_name` is set. Only exports that
    meet `evaluate.require` get this far, so the registry's alias names the last that passed.
    """
    story = Story("export")
    params = load_params()
    story.say(
        f"collecting {ADAPTER}, its metrics and a model card; comparing its answers with those of "
        "the trained model"
    )
    with stage_run("export", params) as record:
        from gptj8.dataset.prepared.dataset import load_prepared
        from gptj8.dataset.prepared.text_encoder import TextEncoder
        from gptj8.evaluation.gate import require_all
        from gptj8.export import bundle
        from gptj8.export.merging import export_merged
        from gptj8.export.reference_answers import compare_in_fresh_process
        from gptj8.model.loading import pick_arithmetic
        from gptj8.serving.registry import register_export

        device, dtype = pick_arithmetic(params.model.dtype)
        measured = measured_by(STAGES[: STAGES.index("export")])
        require = params.evaluate.require
        # Check the metrics that are already known before a large model is loaded and merged.
        require_all([text for text in require if "export/" not in text], measured)
        dataset = bundle.describe_dataset(DATASET, REPORTS / "validate" / "inputs.json")
        with replace_directory(EXPORT) as staging:
            bundle.collect(ADAPTER, BASE, staging, Path(params.model.path))
            bundle.write_chat(staging, load_prepared(DATASET), TextEncoder.load(BASE))
            compared = compare_in_fresh_process(ADAPTER, BASE, staging, dtype, device)
            bundle.require_same_answers(compared, "the export")
            metrics = {"adapter_bytes": bundle.adapter_bytes(staging), **compared}
            if params.export.merge:
                metrics |= export_merged(params, staging / bundle.MERGED, device, dtype)
            measured["export"] = metrics
            require_all(require, measured)
            bundle.describe(staging, resolved(params), measured, dataset)
        write_json(REPORTS / "export" / "metrics.json", metrics)
        if name := params.tracking.registered_model_name:
            alias = params.tracking.registered_model_alias
            version = register_export(record.open_run, name, BASE, EXPORT, measured, alias)
            story.say(
                f"registered as version {version} of {name}"
                + (f": models:/{name}@{alias}" if alias else "")
            )
    story.end(
        f"{metrics['identical_generations']:.0f} of {metrics['compared_prompts']:.0f} prompts "
        f"answered identically, largest logit difference {metrics['max_logit_difference']:.2g} "
        f"({EXPORT})"
    )


if __name__ == "__main__":
    run(main, computes=True)
