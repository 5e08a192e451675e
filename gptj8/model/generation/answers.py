"""Generate free-form answers to many prompts, without restricting them to the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptj8.dataset.prepared.prompts import TextEncoder
from gptj8.model.generation.batch import cache_bytes_per_token, generate_greedily
from gptj8.model.scoring.batching import for_each_batch, max_batch_tokens, plan_batches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_CACHE_BYTES = 1 << 29  # limit for the keys and values of one batch


def write_answers(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    encoder: TextEncoder,
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str | None,
) -> list[str]:
    """Return the greedy continuation of each prompt, stripped of surrounding white space.

    Args:
        model: model in eval mode.
        prompts: non-empty lists of token ids. Prompt and new tokens together must fit into the
            context of the model.
        encoder: decodes the generated ids.
        max_new_tokens: maximum length of an answer, including the end token.
        batch_size: maximum number of rows per batch; reduced if keys and values would exceed 512
            MiB.
        description: label of the progress bar on stderr; None disables it.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit into GPU memory.
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

    limit = min(max_batch_tokens(model.device, 1), _CACHE_BYTES // cache_bytes_per_token(model))
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for_each_batch(plan_batches(lengths, batch_size, limit), write, description, len(prompts))
    return texts
