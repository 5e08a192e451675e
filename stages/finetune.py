"""Stage `finetune`: train an adapter for the 8-bit base model.

python -m stages.finetune
"""

from __future__ import annotations

from gptj8.params.sections import load_params
from gptj8.runtime.distributed import join, launch, leave, process_count
from gptj8.runtime.files import replace_directory, require_free_space, write_json
from gptj8.runtime.machine import peak_memory_gib
from gptj8.runtime.manifest import write_manifest
from gptj8.runtime.process import UNUSED_IN_TRAINING, run
from gptj8.runtime.project import ADAPTER, BASE, DATASET, REPORTS
from gptj8.runtime.story import Story
from gptj8.runtime.tables import write_csv
from gptj8.tracking.stage import stage_run

REPORT = REPORTS / "finetune"
_SPARE_BYTES = 100_000_000  # for the reference answers and the reports


def main() -> None:
    """Train with the settings of the params' `finetune` section and save a PEFT adapter."""
    params = load_params()
    if launch(params.finetune.launcher, "stages.finetune"):
        return
    story = Story("finetune")
    with stage_run("finetune", params) as record:
        from transformers import set_seed

        from gptj8.dataset.prepared.dataset import load_prepared
        from gptj8.dataset.prepared.examples import prompt_ids
        from gptj8.dataset.prepared.text_encoder import TextEncoder
        from gptj8.export.reference_answers import save_reference
        from gptj8.kernels.dispatch import describe_products
        from gptj8.memory.training_memory import TrainingMemory
        from gptj8.model.adapters import AdapterSpec, adapter_bytes, add_adapter, save_adapter
        from gptj8.model.loading import load_model, pick_arithmetic
        from gptj8.model.scoring.likelihood import accuracy_on_validation
        from gptj8.training.loop import train, try_step
        from gptj8.training.saved_states import SavedStates
        from gptj8.training.settings import TrainingSettings
        from gptj8.training.trouble import naming_rows

        join()
        device, dtype = pick_arithmetic(params.model.dtype)
        dataset = load_prepared(DATASET)
        train_set, valid_set = dataset.examples("train"), dataset.examples("validation")
        mine = params.for_one_of(process_count())
        spec = AdapterSpec.from_params(params.finetune)
        memory = TrainingMemory(mine, BASE, dtype, device.type, train_set)
        model, encoder = load_model(BASE, dtype, device), TextEncoder.load(BASE)
        set_seed(params.seed)  # before the adapter is added, whose initial weights are random
        adapted = add_adapter(model, spec)
        packing = params.finetune.packing
        fit = memory.fit(lambda rows, kind: try_step(adapted, rows, kind, packing))
        settings = TrainingSettings.from_params(mine.finetune, fit, params.seed)
        story.say(f"{spec}, {settings.plan(len(train_set))}")
        story.say(f"products: {describe_products(device, dtype)}")
        # The adapter, and three checkpoints: weights, the best ones so far, and at most twice as
        # much for the optimizer.
        require_free_space(ADAPTER, 13 * adapter_bytes(adapted) + _SPARE_BYTES, "training")
        with SavedStates.of_stage(params.finetune, settings, device, dtype).alone() as states:
            limit, log, pad = mine.finetune.max_eval_samples, record.log_metrics, encoder.eos_id
            score = accuracy_on_validation(dataset, encoder, params.data.max_length, limit)
            with naming_rows(dataset):
                result = train(adapted, train_set, valid_set, settings, pad, log, score, states)
            leave()
            with replace_directory(ADAPTER) as staging:
                save_adapter(adapted, staging, dtype)
                ends = dataset.end_ids(encoder)
                save_reference(staging, adapted, map(prompt_ids, valid_set), ends)
                write_manifest(staging)
            for curve in ("loss", "eval_loss"):
                write_csv(REPORT / f"{curve}.csv", result.curve(curve), ["step", curve])
            peak = {"peak_memory_gib": peak_memory_gib()}
            write_json(REPORT / "metrics.json", {**result.metrics, **peak, **memory.metrics(fit)})
            memory.calibrate(result.tokens_per_second / (1 - result.padding_fraction), fit)
            states.clear()
    story.end(f"{result}, peak memory {peak['peak_memory_gib']:.2f} GiB")


if __name__ == "__main__":
    run(main, computes=True, unused=UNUSED_IN_TRAINING)
