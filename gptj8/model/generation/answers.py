"""Generate free-form answers to many prompts, without restricting them to the labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from gptj8.dataset.prepared.prompts import without_lead
from gptj8.dataset.prepared.text_encoder import TextEncoder
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
    end_ids: Collection[int] = (),
) -> list[str]:
    """Return the greedy continuation of each prompt, without the space before an answer.

    Args:
        model: model in eval mode.
        prompts: non-empty lists of token ids. Prompt and new tokens together must fit into the
            context of the model.
        encoder: decodes the generated ids.
        max_new_tokens: maximum length of an answer, including the end token.
        batch_size: maximum number of rows per batch; reduced if keys and values would exceed 512
            MiB.
        description: label of the progress bar on stderr; None disables it.
        end_ids: tokens that end an answer, if not those of `encoder`.

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
            eos_id=end_ids or encoder.end_ids,
        )
        for index, ids in zip(batch, rows, strict=True):
            texts[index] = without_lead(encoder.decode(ids, after=prompts[index]))

    limit = min(max_batch_tokens(model.device, 1), _CACHE_BYTES // cache_bytes_per_token(model))
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for_each_batch(plan_batches(lengths, batch_size, limit), write, description, len(prompts))
    return texts
