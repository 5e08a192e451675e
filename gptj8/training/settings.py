"""Settings and results of training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from gptj8.runtime.distributed import process_count
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted
from gptj8.training.activation_checkpointing import KINDS, Kind
from gptj8.training.fit import Fit, divisors, smaller

if TYPE_CHECKING:
    from peft import PeftModel

    from gptj8.params.sections import Finetune


@dataclass(frozen=True)
class TrainingSettings:
    """Settings for `Trainer`, named as in `transformers.TrainingArguments`.

    Trainer has no part in the best state and in early stopping; see `gptj8.training.best_state`.
    """

    learning_rate: float
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpointing: Kind = "full"
    optim: str = "adamw_bnb_8bit"
    logging_steps: int = 10
    eval_steps: int = 100
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "auto"
    early_stopping_patience: int | None = None
    loraplus_lr_ratio: float | None = None
    neftune_noise_alpha: float | None = None
    packing: bool = False
    max_eval_samples: int | None = None
    seed: int = 0

    @classmethod
    def from_params(cls, finetune: Finetune, fit: Fit, seed: int) -> TrainingSettings:
        """Return the settings in the params section `finetune`, with `auto` replaced by `fit`."""
        given = finetune.model_dump() | {
            "per_device_train_batch_size": fit.micro_batch,
            "gradient_accumulation_steps": finetune.sequences_per_step // fit.micro_batch,
            "checkpointing": fit.checkpointing,
            "load_best_model_at_end": finetune.load_best,
        }
        names = {item.name for item in fields(cls)} - {"seed"}
        return cls(seed=seed, **{name: given[name] for name in names})

    @property
    def keeps_best(self) -> bool:
        """Whether the best state is kept, for the result or to stop early."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def rows_per_step(self) -> int:
        """Rows per step, summed over all processes and GPUs."""
        return process_count() * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def plan(self, rows: int) -> str:
        """Return a text with the rows, epochs and steps of training on `rows` rows."""
        plural = "" if self.num_train_epochs == 1 else "s"
        return (
            f"{rows:,} rows x {self.num_train_epochs:g} epoch{plural}, "
            f"{self.steps(rows):,} steps of {self.rows_per_step}"
        )

    def steps(self, rows: int) -> int:
        """Return the number of steps that Trainer runs with `rows` rows."""
        batches = math.ceil(rows / (self.rows_per_step // self.gradient_accumulation_steps))
        steps_per_epoch = math.ceil(batches / self.gradient_accumulation_steps)
        return math.ceil(self.num_train_epochs * steps_per_epoch)

    def require_more_than_warmup(self, rows: int) -> None:
        """Raise UserError if all steps of training on `rows` rows are warm-up.

        The learning rate would never reach its peak, and would be zero in the only step of
        training with one step.
        """
        steps = self.steps(rows)
        warmup = math.ceil(steps * self._warmup_fraction)  # as TrainingArguments.get_warmup_steps
        if self.lr_scheduler_type != "constant" and warmup >= steps:
            raise UserError(
                f"finetune.warmup_ratio = {self.warmup_ratio:g}: training has "
                f"{counted(steps, 'step')}, all warm-up, so the learning rate would not reach its "
                "peak; set it to 0, or train for more steps (more num_train_epochs, or fewer "
                "sequences per step)"
            )

    @property
    def _warmup_fraction(self) -> float:
        return min(self.warmup_ratio, 0.999)  # Trainer reads 1 as one step

    def divided(self, size: int) -> TrainingSettings:
        """Return settings with micro-batch size `size`, if that is smaller, and as many rows per
        step."""
        if size >= self.per_device_train_batch_size:
            return self
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return replace(
            self, per_device_train_batch_size=size, gradient_accumulation_steps=rows // size
        )

    def with_less_memory(self) -> TrainingSettings | None:
        """Return equivalent settings that need less memory, or None if there are none.

        More is recomputed first; then the micro-batch size is reduced, with more gradient
        accumulation (see `fit.smaller`).
        """
        kinds = KINDS["cuda" if torch.cuda.is_available() else "cpu"]
        kind: Kind = self.checkpointing if self.checkpointing in kinds else kinds[-1]
        size = self.per_device_train_batch_size
        less = smaller(Fit(size, kind), kinds, divisors(size))
        if less is None:
            return None
        return replace(self.divided(less.micro_batch), checkpointing=less.checkpointing)


@dataclass
class TrainingResult:
    """Measurements of training.

    Attributes:
        train_loss: Mean over training, in nats per completion token.
        eval_loss: Of the resulting weights, in nats per completion token.
        eval_accuracy: Of the resulting weights; None if not measured.
        best_step: Step after which the resulting weights were measured to be the best; None if the
            best state is not used.
        tokens: Tokens of the training examples, without padding.
        learned_tokens: Those of them that the loss covers.
        seconds: Total time, including the saved part of interrupted attempts.
        per_device_train_batch_size, gradient_accumulation_steps: At the end of training; they
            differ from the settings if memory ran out.
        tokens_per_second, samples_per_second: Speed of training steps, without padding.
        history: One dict per logged step: `step` and `loss` or `eval_loss`, and others;
            `eval_accuracy` next to `eval_loss`.
    """

    train_loss: float
    eval_loss: float
    eval_accuracy: float | None
    best_step: int | None
    tokens: int
    learned_tokens: int
    trainable_parameters: int
    steps: int
    seconds: float
    tokens_per_second: float
    samples_per_second: float
    padding_fraction: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """All measured values by name, without the history."""
        return {k: v for k, v in asdict(self).items() if k != "history" and v is not None}

    def curve(self, name: str) -> list[dict[str, float]]:
        """Return the points of the history that contain `name`."""
        return [point for point in self.history if name in point]

    def __str__(self) -> str:
        accuracy = "" if self.eval_accuracy is None else f" and accuracy {self.eval_accuracy:.1%}"
        exported = ""
        if self.best_step not in (None, self.steps):
            exported = f", the best state is exported: that of step {self.best_step:,}"
        return (
            f"{self.steps:,} steps, loss {self.train_loss:.3f}, validation loss "
            f"{self.eval_loss:.3f}{accuracy}, {self.tokens_per_second:,.0f} tokens/s"
            f"{exported}"
        )


def training_arguments(
    settings: TrainingSettings, scratch: str, model: PeftModel
) -> TrainingArguments:
    half = half_precision(model)
    arguments = TrainingArguments(
        output_dir=scratch,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings._warmup_fraction,  # below 1: a fraction of all steps
        neftune_noise_alpha=settings.neftune_noise_alpha,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optim,
        bf16=half is torch.bfloat16,
        fp16=half is torch.float16,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        prediction_loss_only=True,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",  # Trainer's checkpoints are pickles and not written atomically
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    # One process uses several GPUs for the layers of one model, not for copies of it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def half_precision(model: PeftModel) -> torch.dtype | None:
    """Return the dtype for autocast, or None if the model does not need autocast.

    float16 models need it for gradient scaling; bfloat16 models need it if float32 LayerNorms are
    trained between bfloat16 layers.
    """
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    if torch.float16 in frozen and torch.cuda.is_available():
        return torch.float16
    trains_norms = model.peft_config["default"].peft_type == "LN_TUNING"
    return torch.bfloat16 if torch.bfloat16 in frozen and trains_norms else None


def autocast(model: PeftModel) -> dict[str, Any]:
    """Return the arguments of `torch.autocast` for a model."""
    half = half_precision(model)
    return {"device_type": model.device.type, "dtype": half, "enabled": half is not None}
