"""Generate free-form answers to many prompts, without restricting them to the labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptj8.dataset.prepared.prompts import without_lead
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.model.generation.batch import GeneratedRow, Sampling, cache_bytes_per_token, generate
from gptj8.model.scoring.batching import for_each_batch, max_batch_tokens, plan_batches

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

_CACHE_BYTES = 1 << 29  # limit for the keys and values of one batch


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the answer, without the space that is put before it in training.
        confidence: see `confidence_of`.
    """

    text: str
    confidence: float


def confidence_of(row: GeneratedRow) -> float:
    """Return the geometric mean of the probabilities of a row's tokens, with its end token.

    It is between 0 and 1 and does not depend on the number of tokens; the probability of the whole
    answer, their product, would rank answers by length. Its logarithm is the mean log-likelihood
    per token, so it is also 1 / perplexity of the answer.
    """
    return math.exp(math.fsum(row.logprobs) / len(row.logprobs))


def write_answers(
    model: Model,
    prompts: Sequence[Sequence[int]],
    encoder: TextEncoder,
    *,
    samplings: Sequence[Sampling],
    batch_size: int,
    description: str | None,
    end_ids: Collection[int] = (),
) -> list[Answer]:
    """Return the answer to each prompt.

    Args:
        model: model in eval mode.
        prompts: non-empty lists of token ids. Prompt and new tokens together must fit into the
            context of the model.
        encoder: decodes the generated ids.
        samplings: settings of each answer, such as its maximum length.
        batch_size: maximum number of rows per batch; reduced if keys and values would exceed 512
            MiB.
        description: label of the progress bar on stderr; None disables it.
        end_ids: tokens that end an answer, if not those of `encoder`.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit into GPU memory.
    """
    answers: list[Answer | None] = [None] * len(prompts)

    def write(batch: list[int]) -> None:
        rows = generate(
            model,
            [prompts[i] for i in batch],
            [samplings[i] for i in batch],
            encoder.vocab_size,
            end_ids or encoder.end_ids,
        )
        for index, row in zip(batch, rows, strict=True):
            text = without_lead(encoder.decode(row.ids, after=prompts[index]))
            answers[index] = Answer(text, confidence_of(row))

    longest = max((sampling.max_new_tokens for sampling in samplings), default=0)
    batches = plan_answers(model, prompts, longest, batch_size)
    for_each_batch(batches, write, description, len(prompts))
    return [answer for answer in answers if answer is not None]


def plan_answers(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Return the indices of the prompts that are answered together; see `write_answers`."""
    limit = min(max_batch_tokens(model.device, 1), _CACHE_BYTES // cache_bytes_per_token(model))
    return plan_batches([len(prompt) + max_new_tokens for prompt in prompts], batch_size, limit)
