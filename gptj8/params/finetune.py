"""The section `finetune` of params.yaml."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from gptj8.params.bounds import Fraction, Positive, PositiveInt
from gptj8.params.yaml_files import Section


class Finetune(Section):
    """Training. Names are those of `transformers.TrainingArguments` and `peft.LoraConfig`."""

    method: Literal["lora", "layernorm"] = "lora"
    """What to train: LoRA adapters, or the normalization layers only."""
    target: Literal["attention", "all-linear"] | tuple[str, ...] = "all-linear"
    """Modules that get a LoRA adapter: a group, or a list of module names."""
    r: PositiveInt = 8
    """LoRA rank."""
    lora_alpha: Positive = 16
    """LoRA scaling; the update is scaled by `lora_alpha / r`, or as `use_rslora` says."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the LoRA layers."""
    use_rslora: bool = False
    """Scale the update by `lora_alpha / sqrt(r)` (rank-stabilized LoRA), which suits large
    ranks."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """Initial LoRA weights. `true`: A is uniform and B zero; `gaussian`: A is normal and B zero;
    `orthogonal`: A and B are not zero but their product is, for an even `r`; `false`: both are
    random, so that training does not begin at the base model."""
    learning_rate: Positive = 2e-3
    """Peak learning rate. The default suits the small default model; for larger models 1e-4 to
    3e-4 is usual."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: the learning rate of the B matrices divided by that of the A matrices, which is
    `learning_rate`. 16 is usual, with a lower `learning_rate`. `null`: the same for both."""
    neftune_noise_alpha: Positive | None = None
    """NEFTune: strength of random noise that is added to the embeddings in training, never in
    evaluation. 5 is usual. `null`: no noise."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    """Learning rate schedule."""
    warmup_ratio: Fraction = 0.05
    """Fraction of the steps over which the learning rate rises from zero. Training whose steps are
    all warm-up is refused."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    num_train_epochs: Positive = 2
    """Number of passes over the training rows; may be fractional."""
    per_device_train_batch_size: PositiveInt | Literal["auto"] = 8
    """Micro-batch size. `auto`: the largest that fits into memory and divides
    `train_batch_size`."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step. Leave it at 1 with `per_device_train_batch_size: auto`,
    which chooses it."""
    train_batch_size: PositiveInt | None = None
    """Sequences per optimizer step, for `per_device_train_batch_size: auto`. `null`: 8. Next to a
    fixed micro-batch size it must be the product of micro-batch size, accumulation steps and
    processes."""
    checkpointing: Literal["full", "reuse", "selective", "none", "auto"] = "auto"
    """Activation checkpointing, what to recompute in backward: everything except block inputs
    (`full`), the same but with restored matrices reused for the gradient (`reuse`), everything
    except matrix products and attention (`selective`), nothing (`none`), or as little as memory
    allows (`auto`). The result is the same."""
    optim: Literal["adamw_bnb_8bit", "adamw_torch"] = "adamw_bnb_8bit"
    """Optimizer."""
    packing: bool = False
    """Lay the rows of a micro-batch end to end, without padding and without seeing each other. A
    step has the same rows as without packing, and the same result except for rounding."""
    logging_steps: PositiveInt = 10
    """Steps between two points of the training curves."""
    eval_steps: PositiveInt = 300
    """Steps between two measurements on the validation split: loss, and accuracy if there are
    labels. With `load_best`, each epoch ends with a measurement too."""
    load_best: bool = True
    """Export the best state that a measurement has seen. `false`: export the last one."""
    metric_for_best_model: Literal["auto", "eval_accuracy", "eval_loss"] = "auto"
    """What the best state is the best in. `auto`: accuracy if there are labels, otherwise loss. Of
    states with equal accuracy, the one with the lower loss is better, then the earlier one."""
    early_stopping_patience: PositiveInt | None = None
    """Stop training after this many measurements in a row without a better `metric_for_best_model`.
    `null`: never. Needs `load_best`."""
    launcher: str | None = None
    """Command line of torchrun to train and evaluate in several processes, for example
    `torchrun --nproc-per-node 2`. `null`: one process."""
    max_eval_samples: PositiveInt | None = None
    """Use only the first N validation examples for these measurements. `null`: use all."""
    save_minutes: Annotated[float, Field(ge=0)] | None = 5
    """Minutes between two checkpoints from which an interrupted training resumes. `null`: save only
    on SIGINT and SIGTERM. The result is the same."""

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimizer step: of one process, or with `auto` of all processes."""
        if self.per_device_train_batch_size == "auto":
            return self.train_batch_size or 8
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @field_validator("launcher")
    @classmethod
    def _is_torchrun(cls, launcher: str | None) -> str | None:
        if launcher is not None:
            words = shlex.split(launcher)  # raises ValueError for an unclosed quote
            if words[:1] != ["torchrun"]:
                raise ValueError(f"{launcher!r} is not a torchrun command line")
        return launcher

    @model_validator(mode="after")
    def _batch_sizes_agree(self) -> Finetune:
        micro, steps = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if micro == "auto":
            if steps != 1:
                raise ValueError(
                    f"gradient_accumulation_steps = {steps} conflicts with "
                    "per_device_train_batch_size = auto, which chooses it; leave it at 1 and set "
                    "train_batch_size"
                )
        elif self.launcher is None and self.train_batch_size not in (None, micro * steps):
            raise ValueError(
                f"train_batch_size = {self.train_batch_size} is not per_device_train_batch_size x "
                f"gradient_accumulation_steps = {micro} x {steps}; set per_device_train_batch_size "
                "to auto, or train_batch_size to null"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> Finetune:
        if self.early_stopping_patience is not None and not self.load_best:
            raise ValueError(
                f"early_stopping_patience = {self.early_stopping_patience} needs load_best = true: "
                "the state at which training stops is not the best one"
            )
        if self.loraplus_lr_ratio is not None and self.method != "lora":
            raise ValueError(
                f"loraplus_lr_ratio = {self.loraplus_lr_ratio:g} applies to method = lora, but the "
                f"method is {self.method}; set it to null"
            )
        if self.init_lora_weights == "orthogonal" and self.r % 2 and self.method == "lora":
            raise ValueError(f"init_lora_weights = orthogonal needs an even r, but r = {self.r}")
        if self.packing and self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha conflicts with packing = true, because its noise depends on "
                "the length of a sequence; set neftune_noise_alpha to null or packing to false"
            )
        return self
