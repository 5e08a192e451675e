r"""Perplexity of documents under a causal language model.

    perplexity = exp( sum of all tokens' negative log-likelihoods / number of tokens )

over all documents together, in nats; never a mean of batch means, in which a short document weighs
as much as a long one. Each document is scored on its own and every token of it is scored: the first
one is conditioned on what the tokenizer puts before a text (Llama's BOS), or, where that is
nothing, on the end-of-text token, which GPT models saw between two documents in training.

A document longer than the model's context is read through windows that overlap (Baevski and Auli,
Adaptive Input Representations for Neural Language Modeling, 2019): a window's first tokens are
context only, so that a scored token has either everything before it or at least `context - stride`
tokens to go by.

    ids        e d d d d d d d d d       context 4, stride 2
    window 1   [. s s s s]               s scored, . context only
    window 2         [. . . s s]
    window 3               [. . . s s]

Memory stays flat: logits are asked for at scored positions only, reduced to one number a token a
batch at a time, and turned into float32 in chunks of at most 64 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptj8.model.scoring.batching import for_each_batch, max_batch_tokens, pad_right, plan_batches
from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Logits in float32 at a time. On a CPU a chunk that stays in its caches is reduced four times as
# fast as one of 64 MiB, for which memory is fetched anew each time.
_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class DocumentScores:
    """What a model makes of each document.

    Attributes:
        nll: (documents,) float64, summed negative log-likelihood in nats.
        tokens: (documents,) int64, tokens scored.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean over all tokens of all documents."""
        return math.exp(self.nll.sum() / self.tokens.sum())


def context_length(config: Any) -> int:
    """Return how many positions a model has; 2048 where its config does not say."""
    values = (getattr(config, field, None) for field in _CONTEXT_FIELDS)
    return next(
        (value for value in values if isinstance(value, int) and value > 0), _DEFAULT_CONTEXT
    )


def plan_windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Return windows (begin, end, first scored) over `length` ids, the starting one included.

    A window has at most `context + 1` ids: `context` inputs, each of which predicts the next id.
    Together the windows score every id but the first exactly once.

    Raises:
        ValueError: unless 1 <= stride <= context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be in 1..{context} (the context), not {stride}")
    windows, scored = [], 1
    for begin in range(0, length, stride):
        if scored >= length:
            break
        end = min(begin + context + 1, length)
        windows.append((begin, end, scored))
        scored = end
    return windows


def score_documents(
    model: PreTrainedModel | PeftModel,
    documents: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int,
    context: int | None = None,
    stride: int | None = None,
    description: str = "perplexity",
) -> DocumentScores:
    """Score `document[start:]` of every document, through windows where one is too long.

    Args:
        model: in eval mode.
        documents: token ids, each beginning with what its first scored token is conditioned on.
        starts: the first position to score in each, at least 1; one at the end scores nothing.
        batch_size: most windows in one forward pass.
        context: most tokens to condition on; None: all that the model has.
        stride: tokens between the beginnings of two windows; None: half of `context`.
        description: of the progress bar.

    Raises:
        UserError: see `score_sequences`.
    """
    context = context or context_length(model.config)
    stride = stride or max(1, context // 2)
    windows, firsts, owners = [], [], []
    for owner, (document, start) in enumerate(zip(documents, starts, strict=True)):
        for begin, end, scored in plan_windows(len(document), context, stride):
            first = max(scored, start)
            if first < end:
                windows.append(document[begin:end])
                firsts.append(first - begin)
                owners.append(owner)
    scores = score_sequences(model, windows, firsts, batch_size=batch_size, description=description)
    nll = np.zeros(len(documents))
    np.add.at(nll, owners, scores)
    tokens = [len(document) - start for document, start in zip(documents, starts, strict=True)]
    return DocumentScores(nll, np.array(tokens, dtype=np.int64))


@torch.inference_mode()
def score_sequences(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int,
    description: str | None = "scoring",
) -> np.ndarray:
    """Return the summed negative log-likelihood of `sequence[start:]` for each sequence.

    Args:
        model: in eval mode; any causal language model of transformers.
        sequences: token ids, none longer than the model's context by more than one.
        starts: the first position of each to score, at least 1.
        batch_size: most sequences in one forward pass.
        description: of the progress bar.

    Returns:
        (sequences,) float64, in nats; sums are taken in float64 whatever the model's dtype.

    Raises:
        UserError: if a likelihood is not a number, as when float16 overflows.
    """
    device = model.device
    totals = np.zeros(len(sequences))
    inputs = [len(sequence) - 1 for sequence in sequences]
    max_tokens = max_batch_tokens(device, model.config.vocab_size)

    def score(batch: list[int]) -> None:
        ids, lengths = pad_right([sequences[i] for i in batch], device)
        position = torch.arange(ids.shape[1] - 1, device=device)
        first = torch.tensor([starts[i] for i in batch], device=device)[:, None] - 1
        real = position < (lengths - 1)[:, None]  # (rows, inputs)
        scored = real & (position >= first)
        logits = model(
            input_ids=ids[:, :-1],
            attention_mask=real.long(),
            use_cache=False,
            logits_to_keep=scored,
        ).logits
        if logits.dim() == 3:  # a model that does not know how to leave positions out
            logits = logits[scored]
        losses = token_nll(logits, ids[:, 1:][scored]).double().cpu()
        rows = scored.nonzero()[:, 0].cpu()
        sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows, losses)
        totals[batch] = sums.numpy()

    batches = plan_batches(inputs, batch_size, max_tokens)
    for_each_batch(batches, score, description, len(sequences))
    if not np.isfinite(totals).all():
        raise UserError(
            f"{description}: the model's likelihoods are not finite for "
            f"{int((~np.isfinite(totals)).sum())} of {len(totals)} texts; try model.dtype: float32"
        )
    return totals


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each target in nats: (tokens,), float32 or more.

    Args:
        logits: (tokens, vocabulary), any floating dtype.
        targets: (tokens,) int64.
    """
    normalizers = log_normalizers(logits)
    return normalizers - logits.gather(1, targets[:, None])[:, 0].to(normalizers.dtype)


def log_normalizers(logits: torch.Tensor) -> torch.Tensor:
    """Return log(sum(exp(logits))) over the vocabulary: (tokens,), float32 or more.

    Args:
        logits: (tokens, vocabulary); no more than 64 MiB of them are float32 at a time.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _CHUNK_LOGITS.get(logits.device.type, 1 << 20) // logits.shape[1])
    return torch.cat([part.to(dtype).logsumexp(1) for part in logits.split(rows)])
