"""Rows of different lengths as padded batches whose memory is bounded.

Rows are sorted by length, so that a batch is nearly free of padding, and go longest first, so that
what does not fit into memory shows at the start and not after an hour. Padding is on the right:
behind a causal mask it cannot reach a real token, and positions stay those of the unpadded row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from gptj8.runtime.progress import progress

# Padded tokens of one forward pass. A CPU gains nothing from more (its caches are small: GPT-J's
# attention at 512 tokens was twice as fast in batches of 1,024 tokens as of 8,192); a GPU needs
# thousands before restoring 8-bit weights stops to count.
_MAX_TOKENS = {"cpu": 2048, "cuda": 16384}

MAX_LOGITS = 1 << 26
"""Logits that one forward pass may return, in the model's dtype: 128 MiB of 16-bit numbers. Only a
single row with more tokens than this allows gets more."""


def max_batch_tokens(device: torch.device, logits_per_token: float) -> int:
    """Return how many padded tokens one forward pass on `device` may have.

    Args:
        device: where the model is.
        logits_per_token: logits that the pass returns for each of its tokens, on average.
    """
    return max(1, min(_MAX_TOKENS.get(device.type, 2048), int(MAX_LOGITS / logits_per_token)))


def plan_batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Group row indices, longest first, so that rows times the longest stays within `max_tokens`.

    Every row is in exactly one batch; a row longer than `max_tokens` is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        batch = batches[-1] if batches else []
        if batch and len(batch) < max_rows and (len(batch) + 1) * lengths[batch[0]] <= max_tokens:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def pad_right(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (rows, longest) int64, padded with 0, and lengths (rows,) int64, on `device`.

    The padding id is of no account: nothing attends to it and nothing of it is scored.
    """
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return ids.to(device), torch.tensor(lengths).to(device)


def for_each_batch(
    batches: Sequence[list[int]],
    score: Callable[[list[int]], None],
    description: str | None,
    rows: int,
) -> None:
    """Call `score` with each batch of row indices, with a progress bar over `rows` on stderr, or
    none where `description` is None.

    A batch that does not fit into the GPU's memory is halved and tried again, and so is every later
    batch with as many rows or more.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit.
    """
    limit = max(map(len, batches), default=1)
    quiet = nullcontext(lambda count: None)
    with progress(rows, description, "rows") if description else quiet as advance:
        for batch in batches:
            done = 0
            while done < len(batch):
                part = batch[done : done + limit]
                try:
                    score(part)
                    done += len(part)
                    advance(len(part))
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    limit = len(part) // 2
                if limit < len(part):  # here: the error no longer holds on to the tensors
                    torch.cuda.empty_cache()
