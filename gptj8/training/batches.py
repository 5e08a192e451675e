"""Which rows a step learns from, and how they become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from gptj8.dataset.prepared.examples import IGNORED, Example, lengths_of, padded_length
from gptj8.model.scoring.perplexity import context_length

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


class RowOrder(Sampler[int]):
    """The order of rows: a function of the seed and the epoch alone.

    Neither how a step's rows are divided nor the random numbers that the model draws change it, and
    a training that goes on in its third epoch finds it without the first two. Rows of similar
    length stand together.

    Args:
        examples: what is trained on.
        rows_a_step: of all processes together.
        seed: of the order.

    Attributes:
        epoch: whose order is iterated over, from 0.
    """

    def __init__(self, examples: Sequence[Example] | Dataset, rows_a_step: int, seed: int) -> None:
        self._lengths = lengths_of(examples)[0].tolist()
        self._rows_a_step = rows_a_step
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.of(self.epoch))

    def of(self, epoch: int) -> list[int]:
        """Return the order of an epoch."""
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(epoch):  # what the epochs before have drawn
            torch.randperm(len(self), generator=generator)
        return get_length_grouped_indices(self._lengths, self._rows_a_step, generator=generator)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of a step, counted from 0 over all epochs."""
        steps_an_epoch = -(-len(self) // self._rows_a_step)
        epoch, within = divmod(step, steps_an_epoch)
        start = within * self._rows_a_step
        return self.of(epoch)[start : start + self._rows_a_step]


class Collator:
    """Pad on the right to the longest example of a batch or a little more.

    Rows of one length stay as they are: they need no mask, and attention is faster without.

    Args:
        pad_id: any token id; padding is masked by position.
        model: whose context bounds a batch, and whose device decides how it is padded.
    """

    def __init__(self, pad_id: int, model: PeftModel) -> None:
        self.pad_id = pad_id
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
        return batch
