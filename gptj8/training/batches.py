"""Select the rows of each step and collate them into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from gptj8.dataset.prepared.examples import (
    IGNORED,
    Example,
    learned_spans,
    lengths_of,
    padded_length,
)
from gptj8.model.scoring.perplexity import context_length

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


class RowOrder(Sampler[int]):
    """Order rows as a function of only the seed and the epoch.

    The order depends neither on the micro-batch size nor on random numbers drawn by the model.
    Training that resumes in its third epoch computes the order without running the first two. Rows
    of similar length are grouped.

    Args:
        examples: The training examples.
        rows_per_step: Rows per step, summed over all processes.
        seed: Seed of the order.

    Attributes:
        epoch: Epoch to iterate over, counted from 0.
    """

    def __init__(
        self, examples: Sequence[Example] | Dataset, rows_per_step: int, seed: int
    ) -> None:
        self._lengths = lengths_of(examples)[0].tolist()
        self._rows_per_step = rows_per_step
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.of(self.epoch))

    def of(self, epoch: int) -> list[int]:
        """Return the row numbers of an epoch in order."""
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(epoch):  # skip the draws of earlier epochs
            torch.randperm(len(self), generator=generator)
        return get_length_grouped_indices(self._lengths, self._rows_per_step, generator=generator)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step; steps are counted from 0 over all epochs."""
        steps_per_epoch = -(-len(self) // self._rows_per_step)
        epoch, within = divmod(step, steps_per_epoch)
        start = within * self._rows_per_step
        return self.of(epoch)[start : start + self._rows_per_step]


class Collator:
    """Pad a batch on the right to the length of its longest example or slightly more.

    Rows of equal length are not padded: they need no mask, and attention is faster without one.

    Args:
        pad_id: Any token id; padding is masked by position.
        model: Model whose context length limits the padding and whose device type decides how much
            padding is added.
    """

    def __init__(self, pad_id: int, model: PeftModel) -> None:
        self.pad_id = pad_id
        self.context, self.device = context_length(model.config), model.device.type

    def padded(self, length: int) -> int:
        """Return the length that a batch is padded to, given that of its longest row."""
        return padded_length(length, self.context, self.device)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        lengths = [len(e["input_ids"]) for e in examples]
        length = max(lengths)
        if min(lengths) < length:
            length = self.padded(length)
        batch = {
            "input_ids": torch.full((len(examples), length), self.pad_id),
            "attention_mask": torch.zeros((len(examples), length), dtype=torch.long),
            "labels": torch.full((len(examples), length), IGNORED),
        }
        for row, example in enumerate(examples):
            filled = len(example["input_ids"])
            batch["input_ids"][row, :filled] = torch.tensor(example["input_ids"])
            for span in learned_spans(example):
                batch["labels"][row, span] = batch["input_ids"][row, span]
            batch["attention_mask"][row, :filled] = 1
        return batch
