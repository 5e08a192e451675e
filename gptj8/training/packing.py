"""Lay the rows of a micro-batch end to end in few sequences, instead of padding each of them.

    padded    a a a . .        packed    a a a b b b b b      positions    0 1 2 0 1 2 3 4
              b b b b b                  c c . . . . . .                   0 1 0 0 0 0 0 0
              c c . . .

Positions begin anew with each row, and a token attends only to earlier tokens of its own row. So
the loss and the gradients are those of the padded rows, except for rounding. The rows of an
optimizer step do not change, unlike in TRL, where packing puts more rows into a step.

transformers derives the attention mask from the positions: where they do not rise by one, a new row
begins. A four-dimensional mask was rejected, because its form differs between attention
implementations, and because models with a sliding window use it in place of their own mask.

The mask is dense: attention in a sequence of n tokens computes n^2 scores, whatever the rows. So
sequences are short (`_LONGEST`), and the number of sequences is the one with the least cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from gptj8.dataset.prepared.examples import IGNORED, Example, learned_spans
from gptj8.quantization.layers import Frozen8bitEmbedding
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line
from gptj8.training.batches import Collator

if TYPE_CHECKING:
    from peft import PeftModel

_LONGEST = 256
"""Tokens of a packed sequence, unless a row is longer."""

_ATTENTION = 1024
"""A sequence of this many tokens costs twice as much per token as a very short one."""

# Largest difference of logits between packed and separate rows, relative to the largest logit. In
# float32, rounding differs by about 1e-6, and a row that sees another one differs by 0.01 or more.
_TOLERANCE = 1e-3


class PackedCollator(Collator):
    """Packs the examples of a micro-batch; pads them if that costs less.

    A packed batch has `position_ids`. Its `attention_mask` marks what is not padding and is not
    meant for the model.
    """

    def __init__(self, pad_id: int, model: PeftModel) -> None:
        super().__init__(pad_id, model)
        self._longest = longest_sequence(self.context)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        lengths = [len(example["input_ids"]) for example in examples]
        sequences = lay_out(lengths, max(self._longest, *lengths), self.padded)
        if len(sequences) == len(examples):
            return super().__call__(examples)
        longest = max(sum(lengths[row] for row in rows) for rows in sequences)
        shape = len(sequences), self.padded(longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for number, rows in enumerate(sequences):
            start = 0
            for row in rows:
                example, end = examples[row], start + lengths[row]
                ids = torch.tensor(example["input_ids"])
                labels = torch.full_like(ids, IGNORED)
                for span in learned_spans(example):
                    labels[span] = ids[span]
                labels[0] = IGNORED  # the token before it belongs to another row
                batch["input_ids"][number, start:end] = ids
                batch["labels"][number, start:end] = labels
                batch["position_ids"][number, start:end] = torch.arange(end - start)
                batch["attention_mask"][number, start:end] = 1
                start = end
        return batch


def longest_sequence(context: int) -> int:
    """Return the largest number of tokens of a packed sequence that has more than one row."""
    return min(_LONGEST, context)


def lay_out(lengths: Sequence[int], longest: int, padded: Callable[[int], int]) -> list[list[int]]:
    """Distribute rows over sequences at the least cost; return the row numbers of each sequence.

    Args:
        lengths: Tokens of each row.
        longest: Most tokens of a sequence.
        padded: Returns the length that sequences of different lengths are padded to.
    """
    best = [[row] for row in range(len(lengths))]
    alone = max(lengths) if min(lengths) == max(lengths) else padded(max(lengths))
    least = _cost(len(lengths), alone)
    for count in range(-(-sum(lengths) // longest), len(lengths)):
        sequences = _balanced(lengths, count)
        size = max(sum(lengths[row] for row in rows) for rows in sequences)
        cost = _cost(count, padded(size))
        if size <= longest and cost < least:
            best, least = sequences, cost
    return best


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Put each row, the longest first, into the sequence that is the shortest so far."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    sizes = [(0, number) for number in range(count)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size, number = sizes[0]
        sequences[number].append(row)
        heapq.heapreplace(sizes, (size + lengths[row], number))
    return sequences


def _cost(sequences: int, size: int) -> float:
    return sequences * size * (1 + size / _ATTENTION)


@torch.no_grad()
def require_packable(model: PeftModel) -> None:
    """Compare the logits of two short rows, packed and apart, in float32.

    Raises:
        UserError: If they differ, because the model does not honor positions or masks as given.
    """
    size = model.config.vocab_size
    rows = [[(7 * i + 11) % size for i in range(9)], [(5 * i + 2) % size for i in range(7)]]
    was_training = model.training
    model.eval()
    try:
        with _in_float32(model):
            apart = [model(input_ids=_row(ids, model), use_cache=False).logits[0] for ids in rows]
            packed = model(
                input_ids=_row([token for ids in rows for token in ids], model),
                position_ids=_row([place for ids in rows for place in range(len(ids))], model),
                use_cache=False,
            ).logits[0]
    except TypeError as error:  # no such argument
        raise _not_packable(model, one_line(error)) from error
    finally:
        model.train(was_training)
    wanted = torch.cat(apart)
    difference = float((packed - wanted).abs().max() / wanted.abs().max())
    if not difference <= _TOLERANCE:
        raise _not_packable(model, "rows see each other, or their positions are wrong")


@contextmanager
def _in_float32(model: PeftModel) -> Iterator[None]:
    """Compute in float32 with the values of a 16-bit model, whose codes stay as they are."""
    halves = (torch.float16, torch.bfloat16)
    with ExitStack() as restored:
        for module in model.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.dtype in halves:
                    restored.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = buffer.float()
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dtype in halves:
                    restored.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = parameter.data.float()
            if isinstance(module, Frozen8bitEmbedding):
                restored.callback(setattr, module, "output_dtype", module.output_dtype)
                module.output_dtype = torch.float32
        yield


def _row(values: Sequence[int], model: PeftModel) -> torch.Tensor:
    return torch.tensor([values], device=model.device)


def _not_packable(model: PeftModel, reason: str) -> UserError:
    return UserError(
        f"finetune.packing = true: models of type {model.config.model_type} cannot be packed "
        f"({reason}); set it to false"
    )
