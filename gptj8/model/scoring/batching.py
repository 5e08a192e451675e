"""Group rows of different lengths into padded batches with bounded memory.

Rows are sorted by length, so batches contain little padding. The longest rows are processed first,
so out-of-memory errors occur at the start of a run. Padding is on the right: a causal mask hides it
from real tokens, and positions equal those of the unpadded row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from gptj8.runtime.progress import progress

# Padded tokens per forward pass. Larger batches do not help on a CPU because its caches are small:
# GPT-J's attention at 512 tokens was twice as fast in batches of 1,024 tokens as in batches of
# 8,192. A GPU needs thousands of tokens to make the cost of dequantizing 8-bit weights negligible.
_MAX_TOKENS = {"cpu": 2048, "cuda": 16384}

MAX_LOGITS = 1 << 26
"""Maximum number of logits per forward pass: 128 MiB in a 16-bit dtype. A single row that needs
more exceeds the limit."""


def max_batch_tokens(device: torch.device, logits_per_token: float) -> int:
    """Return the maximum number of padded tokens per forward pass on `device`.

    Args:
        device: device of the model.
        logits_per_token: average number of logits that the pass returns per token.
    """
    return max(1, min(_MAX_TOKENS.get(device.type, 2048), int(MAX_LOGITS / logits_per_token)))


def plan_batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Group row indices into batches of at most `max_tokens` padded tokens, longest rows first.

    Every row is in exactly one batch; a row longer than `max_tokens` gets a separate batch.
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

    Any padding id would do: padding is never attended to or scored.
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
    """Call `score` with each batch of row indices and show a progress bar on stderr.

    If a batch does not fit into GPU memory, it is halved and retried, and later batches are limited
    to the reduced size.

    Args:
        batches: row indices of each batch.
        score: function to call.
        description: label of the progress bar; None disables it.
        rows: total number of rows, for the progress bar.

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
                if limit < len(part):  # outside `except`: the error has released its tensors
                    torch.cuda.empty_cache()
