"""What a model writes after many prompts, when nothing holds it to the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptj8.dataset.prepared.prompts import TextEncoder
from gptj8.model.generation.batch import cache_bytes_per_token, generate_greedily
from gptj8.model.scoring.batching import for_each_batch, max_batch_tokens, plan_batches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_CACHE_BYTES = 1 << 29  # keys and values of all rows that are generated together


def write_answers(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    encoder: TextEncoder,
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str | None,
) -> list[str]:
    """Return the likeliest continuation of each prompt, without white space around it.

    Args:
        model: in eval mode.
        prompts: ids, each at least one; with the new tokens within the model's context.
        encoder: reads what the model writes.
        max_new_tokens: of each, its end included.
        batch_size: most rows together; fewer where keys and values would take more than 512 MiB.
        description: of a progress bar on stderr; None: there is none.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit into the GPU's memory.
    """
    texts = [""] * len(prompts)

    def write(batch: list[int]) -> None:
        rows = generate_greedily(
            model,
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
        )
        for index, ids in zip(batch, rows, strict=True):
            texts[index] = encoder.decode(ids).strip()

    most = min(max_batch_tokens(model.device, 1), _CACHE_BYTES // cache_bytes_per_token(model))
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for_each_batch(plan_batches(lengths, batch_size, most), write, description, len(prompts))
    return texts
