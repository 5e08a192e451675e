"""Fine-tuning on the frozen 8-bit model through `transformers.Trainer`."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from gptj8.adapters import trainable_parameters
from gptj8.checkpointing import Kind, set_checkpointing
from gptj8.distributed import process_count, process_number, share_trained_only, summed
from gptj8.errors import UserError
from gptj8.evaluation.perplexity import context_length
from gptj8.examples import IGNORED, Example, lengths_of, padded_length
from gptj8.loss import frozen_cross_entropy, frozen_head, input_of
from gptj8.runtime import memory_gib
from gptj8.training_progress import TrainingProgress

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from gptj8.memory.fitting import Fit
    from gptj8.params import Finetune

_LOGGED = ("loss", "eval_loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class TrainingSettings:
    """What `Trainer` is told; names and meanings are `transformers.TrainingArguments`'."""

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
    max_eval_samples: int | None = None
    seed: int = 0

    @classmethod
    def from_params(cls, finetune: Finetune, fit: Fit, seed: int) -> TrainingSettings:
        """Pick the settings out of the params' `finetune` section; `auto` is replaced by what
        fits."""
        given = finetune.model_dump() | {
            "per_device_train_batch_size": fit.micro_batch,
            "gradient_accumulation_steps": finetune.sequences_a_step // fit.micro_batch,
            "checkpointing": fit.checkpointing,
        }
        names = {item.name for item in fields(cls)} - {"seed"}
        return cls(seed=seed, **{name: given[name] for name in names})

    @property
    def rows_a_step(self) -> int:
        """Rows of one step, of all processes and GPUs together."""
        processes = process_count()
        devices = processes if processes > 1 else max(1, torch.cuda.device_count())
        return devices * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps(self, rows: int) -> int:
        """Return how many steps Trainer makes with so many rows."""
        batches = math.ceil(rows / (self.rows_a_step // self.gradient_accumulation_steps))
        steps_an_epoch = math.ceil(batches / self.gradient_accumulation_steps)
        return math.ceil(self.num_train_epochs * steps_an_epoch)


@dataclass
class TrainingResult:
    """What training measured.

    Attributes:
        train_loss, eval_loss: nats a completion token; the mean over training, and at its end.
        eval_accuracy: at its end; None where none was measured.
        tokens_per_second, samples_per_second: of training steps alone, padding not counted.
        history: one dict a logged step: `step` and `loss` or `eval_loss`, and others;
            `eval_accuracy` beside the latter.
    """

    train_loss: float
    eval_loss: float
    eval_accuracy: float | None
    trainable_parameters: int
    steps: int
    seconds: float
    tokens_per_second: float
    samples_per_second: float
    padding_fraction: float
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    model: PeftModel,
    train_examples: Sequence[Example] | Dataset,
    eval_examples: Sequence[Example] | Dataset,
    settings: TrainingSettings,
    pad_id: int,
    log: Callable[[dict[str, float], int], None] = lambda values, step: None,
    eval_accuracy: Callable[[PeftModel], float] | None = None,
) -> TrainingResult:
    """Train the adapter in place.

    Args:
        model: from `adapters.add_adapter`.
        train_examples, eval_examples: from `PreparedDataset.examples`, or a list of the same.
        pad_id: any token id; padding is masked by position.
        log: called with values and step as training goes: `loss`, `learning_rate`, `grad_norm`,
            `eval_loss`, `eval_accuracy`, `tokens_per_second`.
        eval_accuracy: measures the model in eval mode, wherever its loss is measured.

    Raises:
        UserError: if the loss is not finite, or nothing was learned.
    """
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    monitor = _Monitor(log, eval_accuracy)
    collator = _Collator(pad_id, monitor, model)
    model.config.use_cache = False
    set_checkpointing(model, settings.checkpointing)
    share_trained_only(model)
    if settings.max_eval_samples is not None:
        eval_examples = _first(eval_examples, settings.max_eval_samples)
    with (
        tempfile.TemporaryDirectory(prefix="gptj8-trainer-") as scratch,
        TrainingProgress(monitor) as shown,
    ):
        trainer = _CompletionTrainer(
            model=model,
            args=_training_arguments(settings, scratch, model),
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            data_collator=collator,
            callbacks=[monitor, shown],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        output = trainer.train()
        if monitor.last_eval_step != trainer.state.global_step:
            trainer.evaluate()
        eval_loss = monitor.eval_loss
        seconds = time.perf_counter() - started
    if not math.isfinite(output.training_loss) or not math.isfinite(eval_loss):
        raise UserError(_not_finite(output.training_loss, trainer.state.global_step))
    if not any(
        not torch.equal(p.detach(), before[n])
        for n, p in model.named_parameters()
        if p.requires_grad
    ):
        raise UserError("training moved no weight; finetune.learning_rate may be too small")
    tokens, samples, padding = summed((monitor.tokens, monitor.samples, monitor.padding))
    return TrainingResult(
        train_loss=float(output.training_loss),
        eval_loss=eval_loss,
        eval_accuracy=monitor.eval_accuracy,
        trainable_parameters=trainable_parameters(model),
        steps=trainer.state.global_step,
        seconds=seconds,
        tokens_per_second=tokens / monitor.step_seconds,
        samples_per_second=samples / monitor.step_seconds,
        padding_fraction=padding / max(1, padding + tokens),
        history=monitor.history,
    )


def try_step(model: PeftModel, examples: Sequence[Example], checkpointing: Kind) -> None:
    """Run forward and backward of one micro-batch as training will, to see whether it fits.

    Nothing of it stays: neither gradients nor draws of random numbers.

    Raises:
        torch.OutOfMemoryError, RuntimeError or MemoryError: if it does not.
    """
    was_training = model.training
    monitor = _Monitor(lambda values, step: None, None)
    batch = _Collator(0, monitor, model)(examples)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.config.use_cache = False
    model.train()
    set_checkpointing(model, checkpointing)
    try:
        with torch.random.fork_rng(devices):
            with torch.autocast(**_autocast(model)):
                total, _, _ = _summed_loss(model, inputs)
            total.backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _first(examples: Sequence[Example] | Dataset, count: int) -> Sequence[Example] | Dataset:
    if isinstance(examples, Sequence):
        return examples[:count]
    return examples.take(min(count, len(examples)))


def _training_arguments(
    settings: TrainingSettings, scratch: str, model: PeftModel
) -> TrainingArguments:
    half = _half_precision(model)
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=min(settings.warmup_ratio, 0.999),  # below 1 it is a share of all steps
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
        save_strategy="no",
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


def _half_precision(model: PeftModel) -> torch.dtype | None:
    """Return the dtype to run under autocast in, where the model needs it: float16 for the scaling
    of its gradients, bfloat16 if float32 LayerNorms are trained between bfloat16 layers."""
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    if torch.float16 in frozen and torch.cuda.is_available():
        return torch.float16
    trains_norms = model.peft_config["default"].peft_type == "LN_TUNING"
    return torch.bfloat16 if torch.bfloat16 in frozen and trains_norms else None


def _autocast(model: PeftModel) -> dict[str, Any]:
    half = _half_precision(model)
    return {"device_type": model.device.type, "dtype": half, "enabled": half is not None}


def _not_finite(loss: float, step: int) -> str:
    return f"the loss is {loss} at step {step}; lower finetune.learning_rate or max_grad_norm"


def _summed_loss(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the loss summed over learned tokens, how many those are, and the model's outputs."""
    targets = inputs["labels"][:, 1:]  # the logits at a position predict the next one's token
    learned = (targets != IGNORED).any(dim=0).nonzero().flatten()
    targets = targets[:, learned]
    arguments = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "logits_to_keep": learned,
    }
    head = frozen_head(model)
    if head is None:
        outputs = model(**arguments)
        total = torch.nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    else:
        with input_of(head) as taken:
            outputs = model(**arguments)
        is_learned = targets != IGNORED
        total = frozen_cross_entropy(taken[0][is_learned], targets[is_learned], head)
    return total, (targets != IGNORED).sum(), outputs


class _CompletionTrainer(Trainer):
    """A Trainer that asks for logits only where a token is learned.

    The head is a fifth of the arithmetic of a small model, and float32 logits of a prompt are the
    largest tensors of a large one; neither the prompt's nor the padding's are of use.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        total, learned, outputs = _summed_loss(model, inputs)
        # With accumulated gradients, Trainer counts the learned tokens of all micro-batches.
        count = learned if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None:  # of all processes, over which gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        """Order rows by the seed alone: neither by how a step's rows are divided, nor by the random
        numbers that the model draws."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = lengths_of(rows)[0].tolist()
        processes = self.accelerator.num_processes
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * processes
        generator = torch.Generator().manual_seed(self.args.seed)
        return LengthGroupedSampler(step, lengths=lengths, generator=generator)


class _Collator:
    """Pad on the right to the longest example of a batch or a little more, and count it.

    Rows of one length stay as they are: they need no mask, and attention is faster without.
    """

    def __init__(self, pad_id: int, monitor: _Monitor, model: PeftModel) -> None:
        self.pad_id = pad_id
        self.monitor = monitor
        self.context, self.device = context_length(model.config), model.device.type

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        lengths = [len(e["input_ids"]) for e in examples]
        length = max(lengths)
        if min(lengths) < length:
            length = padded_length(length, self.context, self.device)
        batch = {
            "input_ids": torch.full((len(examples), length), self.pad_id),
            "attention_mask": torch.zeros((len(examples), length), dtype=torch.long),
            "labels": torch.full((len(examples), length), IGNORED),
        }
        for row, example in enumerate(examples):
            filled = len(example["input_ids"])
            batch["input_ids"][row, :filled] = torch.tensor(example["input_ids"])
            learned = slice(example["prompt_length"], filled)
            batch["labels"][row, learned] = batch["input_ids"][row, learned]
            batch["attention_mask"][row, :filled] = 1
        self.monitor.count(batch["attention_mask"])
        return batch


class _Monitor(TrainerCallback):
    """Follow training: time of the steps alone, loss history, and a stop when the loss is lost."""

    def __init__(
        self,
        log: Callable[[dict[str, float], int], None],
        measure_accuracy: Callable[[PeftModel], float] | None,
    ) -> None:
        self.log = log
        self.eval_loss = math.nan
        self.eval_accuracy: float | None = None
        self.last_eval_step = -1
        self._measure_accuracy = measure_accuracy
        self.history: list[dict[str, float]] = []
        self.tokens = self.padding = self.samples = 0
        self.step_seconds = 0.0
        self._training = False
        self._step_started = 0.0

    def count(self, attention_mask: torch.Tensor) -> None:
        """Count one batch; evaluation's batches are not training's."""
        if self._training:
            used = int(attention_mask.sum())
            self.tokens += used
            self.padding += attention_mask.numel() - used
            self.samples += attention_mask.shape[0]

    @property
    def tokens_per_second(self) -> float:
        """Of training steps so far; other processes are taken to have as many tokens."""
        return self.tokens * process_count() / max(self.step_seconds, 1e-9)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if process_count() > 1:  # other rows want other draws of dropout
            torch.manual_seed(args.seed + process_number())
        self._training, self._step_started = True, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.step_seconds += now - self._step_started
        self._step_started = now
        # Trainer evaluates after this call and before the next step.
        self._training = not (state.global_step % state.eval_steps == 0)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.last_eval_step = state.global_step
        if self._measure_accuracy is not None:
            model.eval()  # Trainer's next step puts it back
            with torch.autocast(**_autocast(model)):
                self.eval_accuracy = self._measure_accuracy(model)
            # Trainer has logged the loss of this evaluation before.
            self.history[-1]["eval_accuracy"] = self.eval_accuracy
            self.log({"eval_accuracy": self.eval_accuracy}, state.global_step)
        self._training, self._step_started = True, time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        values = {name: float(logs[name]) for name in _LOGGED if name in logs}
        if not values:
            return
        self.eval_loss = values.get("eval_loss", self.eval_loss)
        if "loss" in values:
            if not math.isfinite(values["loss"]):
                raise UserError(_not_finite(values["loss"], state.global_step))
            values["tokens_per_second"] = self.tokens_per_second
            values["memory_gib"] = memory_gib()
        self.log(values, state.global_step)
        self.history.append({"step": state.global_step, **values})
