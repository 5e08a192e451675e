"""Stage `finetune`: an adapter for the 8-bit base model.

python -m stages.finetune
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gptj8.params.sections import Params, load_params
from gptj8.runtime.distributed import join, launch, leave, process_count
from gptj8.runtime.errors import UserError
from gptj8.runtime.files import replace_directory, require_free_space, write_csv, write_json
from gptj8.runtime.machine import peak_memory_gib
from gptj8.runtime.manifest import MANIFEST, write_manifest
from gptj8.runtime.process import UNUSED_IN_TRAINING, run
from gptj8.runtime.project import state_folder
from gptj8.runtime.story import Story
from gptj8.tracking.stage import stage_run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from gptj8.dataset.prepared.dataset import PreparedDataset
    from gptj8.dataset.prepared.prompts import TextEncoder
    from gptj8.model.adapters import AdapterSpec
    from gptj8.training.saved_states import SavedStates
    from gptj8.training.settings import TrainingSettings
    from gptj8.training.trouble import TrainingDivergedError

DATASET = Path("artifacts/dataset")
BASE = Path("artifacts/base-8bit")
OUTPUT = Path("artifacts/adapter")
REPORT = Path("reports/finetune")

_SPARE_BYTES = 100_000_000  # answers to compare exports with, and reports


def main() -> None:
    """Train as the params' `finetune` section says and save the adapter in PEFT's format."""
    params = load_params()
    if launch(params.finetune.launcher, "stages.finetune"):
        return
    story = Story("finetune")
    with stage_run("finetune", params) as record, ExitStack() as stack:
        from transformers import set_seed

        from gptj8.dataset.prepared.dataset import load_prepared
        from gptj8.dataset.prepared.examples import prompt_ids
        from gptj8.dataset.prepared.prompts import TextEncoder
        from gptj8.export.reference_answers import choose_prompts, save_reference
        from gptj8.memory.training_memory import TrainingMemory
        from gptj8.model.adapters import (
            AdapterSpec,
            add_adapter,
            round_layernorms,
            save_adapter,
            trainable_parameters,
        )
        from gptj8.model.loading import load_model, pick_device, pick_dtype
        from gptj8.training.loop import train, try_step
        from gptj8.training.settings import TrainingSettings
        from gptj8.training.trouble import TrainingDivergedError

        join()
        device = pick_device()
        dtype = pick_dtype(params.model.dtype, device)
        dataset = load_prepared(DATASET)
        train_set, validation_set = dataset.examples("train"), dataset.examples("validation")
        spec = AdapterSpec.from_params(params.finetune)
        mine = params.for_one_of(process_count())
        finetune = mine.finetune
        memory = TrainingMemory(mine, BASE, dtype, device.type, train_set)
        model = load_model(BASE, dtype, device)
        encoder = TextEncoder.load(BASE)

        set_seed(params.seed)  # before the adapter is made: its first weights are random
        adapted = add_adapter(model, spec)
        fit = memory.fit(lambda rows, kind: try_step(adapted, rows, kind))
        settings = TrainingSettings.from_params(finetune, fit, params.seed)
        story.say(_describe(spec, settings, len(train_set)))
        # The adapter, and three states: weights, and at most as much again twice for the optimizer.
        trained = 4 * trainable_parameters(adapted)
        require_free_space(OUTPUT, 10 * trained + _SPARE_BYTES, "training")
        checkpoints = stack.enter_context(_checkpoints(params, settings, device, dtype).alone())
        try:
            result = train(
                adapted,
                train_set,
                validation_set,
                settings,
                encoder.eos_id,
                record.log_metrics,
                _label_accuracy(params, dataset, encoder),
                checkpoints,
            )
        except TrainingDivergedError as error:
            raise UserError(_of_rows(error, dataset)) from None
        leave()
        round_layernorms(adapted, dtype)
        with replace_directory(OUTPUT) as staging:
            save_adapter(adapted, staging)
            compared = choose_prompts(map(prompt_ids, validation_set))
            save_reference(staging, adapted, compared, encoder.eos_id)
            write_manifest(staging)
        for curve in ("loss", "eval_loss"):
            rows = [point for point in result.history if curve in point]
            write_csv(REPORT / f"{curve}.csv", rows)
        measured = asdict(result).items()
        metrics = {k: v for k, v in measured if k != "history" and v is not None}
        peak = peak_memory_gib()
        metrics |= {
            "peak_memory_gib": peak,
            **memory.metrics(fit),
        }
        write_json(REPORT / "metrics.json", metrics)
        memory.calibrate(result.tokens_per_second / (1 - result.padding_fraction), fit)
        checkpoints.clear()
    accuracy = result.eval_accuracy
    story.end(
        f"{result.steps:,} steps, loss {result.train_loss:.3f}, validation loss "
        f"{result.eval_loss:.3f}{'' if accuracy is None else f' and accuracy {accuracy:.1%}'}, "
        f"{result.tokens_per_second:,.0f} tokens/s, peak memory {peak:.2f} GiB"
    )


def _describe(spec: AdapterSpec, settings: TrainingSettings, rows: int) -> str:
    """Return what is trained, on how much."""
    epochs = settings.num_train_epochs
    return (
        f"{spec}, {rows:,} rows x {epochs:g} epoch{'' if epochs == 1 else 's'}, "
        f"{settings.steps(rows):,} steps of {settings.rows_a_step}"
    )


def _checkpoints(
    params: Params, settings: TrainingSettings, device: torch.device, dtype: torch.dtype
) -> SavedStates:
    """Return where states of this training lie, and nothing that another one saved.

    How a step's rows are divided, and what is computed again, may change when a training goes on:
    then it needs less memory.
    """
    from gptj8.training.saved_states import SavedStates, training_key

    of_memory = {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "train_batch_size",
        "checkpointing",
        "launcher",
        "save_minutes",
    }
    decided_by = params.finetune.model_dump(mode="json", exclude=of_memory) | {
        "seed": params.seed,
        "device": device.type,
        "dtype": str(dtype),
        "rows_a_step": settings.rows_a_step,
        "processes": process_count(),
    }
    key = training_key(decided_by, DATASET / MANIFEST, BASE / MANIFEST)
    minutes = params.finetune.save_minutes
    every = None if minutes is None else 60 * minutes
    return SavedStates(state_folder() / "checkpoints", key, every)


def _of_rows(error: TrainingDivergedError, dataset: PreparedDataset) -> str:
    """Return what went wrong with the rows of the user's files that it happened on."""
    if dataset.task == "text" or not error.examples:  # an example is then of many rows
        return str(error)
    rows = dataset.split("train").iloc[error.examples]
    return error.told([f"{f}:{r}" for f, r in zip(rows["file"], rows["row"], strict=True)])


def _label_accuracy(
    params: Params, dataset: PreparedDataset, encoder: TextEncoder
) -> Callable[[PeftModel, int], float] | None:
    """Return what measures accuracy by label likelihood on the validation split, if it has labels.

    Not the share of tokens that are the likeliest ones, given all right ones before: that is nearly
    1 long before any answer is right.
    """
    if not dataset.labels:
        return None
    from gptj8.model.scoring.likelihood import label_accuracy

    rows = dataset.split("validation")
    rows = rows.head(params.finetune.max_eval_samples or len(rows))
    prompts = dataset.prompt_encoder(encoder, params.data.max_length)
    labels = [prompts.completion_ids(label) for label in dataset.labels]
    longest = max(map(len, labels))
    ids = [prompts.prompt(text, longest).ids for text in rows["text"]]
    actual = [dataset.labels.index(label) for label in rows["label"]]
    return lambda model, batch_size: label_accuracy(
        model,
        ids,
        labels,
        actual,
        batch_size=batch_size,
        description="validation accuracy",
    )


if __name__ == "__main__":
    run(main, computes=True, unused=UNUSED_IN_TRAINING)
