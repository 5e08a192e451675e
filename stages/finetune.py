"""Stage `finetune`: an adapter for the 8-bit base model.

python -m stages.finetune
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from gptj8.files import replace_directory, write_csv, write_json
from gptj8.params import load_params
from gptj8.runtime import peak_memory_gib, run
from gptj8.tracking import stage_run

DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
OUTPUT = Path("artifacts/adapter")
REPORT = Path("reports/finetune")


def main() -> None:
    """Train as the params' `finetune` section says and save the adapter in PEFT's format."""
    params = load_params()
    finetune = params.finetune
    with stage_run("finetune", params) as record:
        from transformers import set_seed

        from gptj8.adapters import add_adapter
        from gptj8.dataset import load_prepared
        from gptj8.examples import prompt_ids
        from gptj8.models import load_model, pick_device, pick_dtype
        from gptj8.prompts import TextEncoder
        from gptj8.reference import PROMPTS, save_reference
        from gptj8.training import TrainingSettings, train

        device = pick_device()
        model = load_model(BASE, pick_dtype(params.model.dtype, device), device)
        encoder = TextEncoder.load(BASE)
        dataset = load_prepared(DATASET)
        train_set, validation_set = dataset.examples("train"), dataset.examples("validation")

        set_seed(params.seed)  # before the adapter is made: its first weights are random
        adapted = add_adapter(
            model,
            finetune.method,
            finetune.target,
            r=finetune.r,
            lora_alpha=finetune.lora_alpha,
            lora_dropout=finetune.lora_dropout,
        )
        settings = TrainingSettings.from_params(finetune.model_dump(), params.seed)
        result = train(
            adapted, train_set, validation_set, settings, encoder.eos_id, record.log_metrics
        )
        with replace_directory(OUTPUT) as staging:
            adapted.save_pretrained(str(staging))
            compared = validation_set.take(min(PROMPTS, len(validation_set)))
            save_reference(staging, adapted, [prompt_ids(example) for example in compared])
        for curve in ("loss", "eval_loss"):
            rows = [point for point in result.history if curve in point]
            write_csv(REPORT / f"{curve}.csv", rows)
        metrics = {k: v for k, v in asdict(result).items() if k != "history"}
        write_json(REPORT / "metrics.json", {**metrics, "peak_memory_gib": peak_memory_gib()})
        record.log_artifact(OUTPUT, OUTPUT.name)


if __name__ == "__main__":
    run(main)
