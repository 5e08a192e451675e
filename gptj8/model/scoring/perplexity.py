r"""Perplexity of documents under a causal language model.

    perplexity = exp( sum of the negative log-likelihoods of all tokens / number of tokens )

The sum is taken over all documents, in nats. A mean of batch means would give short documents the
same weight as long ones. Documents are scored independently, and every token is scored. The first
token is conditioned on the prefix that the tokenizer adds to a text (BOS for Llama), or, without a
prefix, on the end-of-text token, which separates documents in the training data of GPT models.

Documents longer than the context of the model are split into overlapping windows (Baevski and Auli,
Adaptive Input Representations for Neural Language Modeling, 2019). The first tokens of a window
serve as context only, so each scored token is conditioned on all previous tokens or on at least
`context - stride` of them.

    ids        e d d d d d d d d d       context 4, stride 2
    window 1   [. s s s s]               s: scored, .: context only
    window 2         [. . . s s]
    window 3               [. . . s s]

Memory is bounded: logits are computed only at scored positions, reduced to one number per token
after each batch, and converted to float32 in chunks of at most 64 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptj8.model.scoring.batching import for_each_batch, max_batch_tokens, pad_right, plan_batches
from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Number of logits converted to float32 per chunk. On a CPU, a chunk that fits into its caches is
# reduced four times as fast as a chunk of 64 MiB, which needs newly allocated memory each time.
_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class DocumentScores:
    """Scores of one model on each document.

    Attributes:
        nll: (documents,) float64, summed negative log-likelihood in nats.
        tokens: (documents,) int64, number of scored tokens.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over all tokens of all documents."""
        return math.exp(self.nll.sum() / self.tokens.sum())


def context_length(config: Any) -> int:
    """Return the context length of a model; 2048 if its config does not define one."""
    values = (getattr(config, field, None) for field in _CONTEXT_FIELDS)
    return next(
        (value for value in values if isinstance(value, int) and value > 0), _DEFAULT_CONTEXT
    )


def plan_windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Return windows (begin, end, first scored) over `length` ids, including the initial prefix id.

    A window has at most `context + 1` ids: `context` inputs, each of which predicts the next id.
    Together, the windows score every id except the first exactly once.

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
    spans: Sequence[Sequence[int]] | None = None,
) -> DocumentScores:
    """Score `document[start:]` of every document; long documents are split into windows.

    Args:
        model: model in eval mode.
        documents: token ids of each document, including the tokens before the first scored one.
        starts: first position to score in each document, at least 1. A start at the end of a
            document scores no tokens.
        batch_size: maximum number of windows per forward pass.
        context: maximum number of tokens to condition on; None uses the context of the model.
        stride: number of tokens between the starts of two windows; None uses half of `context`.
        description: label of the progress bar.
        spans: for each document, the spans (start, end, start, end, ...) to score, which begin at
            `start`; None scores everything from there.

    Raises:
        UserError: see `score_sequences`.
    """
    context = context or context_length(model.config)
    stride = stride or max(1, context // 2)
    windows, firsts, owners, masks = [], [], [], []
    for owner, (document, start) in enumerate(zip(documents, starts, strict=True)):
        for begin, end, scored in plan_windows(len(document), context, stride):
            first = max(scored, start)
            mask = None if spans is None else span_mask(spans[owner], begin, end)
            if first < end and (mask is None or mask[first - begin :].any()):
                windows.append(document[begin:end])
                firsts.append(first - begin)
                owners.append(owner)
                masks.append(mask)
    scores = score_sequences(
        model,
        windows,
        firsts,
        batch_size=batch_size,
        description=description,
        masks=None if spans is None else masks,
    )
    nll = np.zeros(len(documents))
    np.add.at(nll, owners, scores)
    tokens = [len(document) - start for document, start in zip(documents, starts, strict=True)]
    if spans is not None:
        every = zip(spans, starts, strict=True)
        tokens = [int(span_mask(s, start, s[-1]).sum()) for s, start in every]
    return DocumentScores(nll, np.array(tokens, dtype=np.int64))


def span_mask(spans: Sequence[int], begin: int, end: int) -> np.ndarray:
    """Return (end - begin,) bool: which positions are inside a span (start, end, start, end, ...).

    Args:
        spans: positions in a document.
        begin, end: the window of the document.
    """
    mask = np.zeros(max(0, end - begin), dtype=bool)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        mask[max(0, start - begin) : max(0, stop - begin)] = True
    return mask


def score_sequences(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int,
    description: str | None = "scoring",
    masks: Sequence[Any] | None = None,
) -> np.ndarray:
    """Return the summed negative log-likelihood of `sequence[start:]` for each sequence.

    Args:
        model: any causal language model of transformers, in eval mode.
        sequences: token ids, at most one more than the context of the model.
        starts: first position to score in each sequence, at least 1.
        batch_size: maximum number of sequences per forward pass.
        description: label of the progress bar; None disables it.
        masks: for each sequence, (ids,) bool: the positions to score from `start` on; None: all.

    Returns:
        (sequences,) float64, in nats; sums are computed in float64 for every model dtype.

    Raises:
        UserError: if a likelihood is not finite, for example because float16 overflows.
    """
    totals = np.zeros(len(sequences))

    def score(
        batch: Sequence[int], rows: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
    ) -> None:
        losses = token_nll(logits, targets).double().cpu()
        sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows, losses)
        totals[batch] = sums.numpy()

    visit_logits(
        model,
        sequences,
        starts,
        score,
        batch_size=batch_size,
        description=description,
        masks=masks,
    )
    if not np.isfinite(totals).all():
        raise UserError(
            f"{description}: the model's likelihoods are not finite for "
            f"{int((~np.isfinite(totals)).sum())} of {len(totals)} texts; try model.dtype: float32"
        )
    return totals


Visit = Callable[[Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor], None]


@torch.inference_mode()
def visit_logits(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    visit: Visit,
    *,
    batch_size: int,
    description: str | None = "scoring",
    masks: Sequence[Any] | None = None,
) -> None:
    """Compute the logits that predict `sequence[start:]` of each sequence, batch by batch.

    Args:
        visit: called once per batch with the numbers of its sequences; and, for each scored token,
            in the order of the sequences: the sequence's place in the batch (int64, on the CPU),
            logits (tokens, vocabulary) and the token itself.

    The other arguments are those of `score_sequences`.
    """
    device = model.device
    inputs = [len(sequence) - 1 for sequence in sequences]
    max_tokens = max_batch_tokens(device, model.config.vocab_size)

    def run(batch: list[int]) -> None:
        ids, lengths = pad_right([sequences[i] for i in batch], device)
        position = torch.arange(ids.shape[1] - 1, device=device)
        first = torch.tensor([starts[i] for i in batch], device=device)[:, None] - 1
        real = position < (lengths - 1)[:, None]  # (rows, inputs)
        scored = real & (position >= first)
        if masks is not None:
            wanted, _ = pad_right([masks[i][1:] for i in batch], device)
            scored &= wanted.bool()
        logits = model(
            input_ids=ids[:, :-1],
            attention_mask=real.long(),
            use_cache=False,
            logits_to_keep=scored,
        ).logits
        if logits.dim() == 3:  # the model does not support a `logits_to_keep` mask
            logits = logits[scored]
        visit(batch, scored.nonzero()[:, 0].cpu(), logits, ids[:, 1:][scored])

    batches = plan_batches(inputs, batch_size, max_tokens)
    for_each_batch(batches, run, description, len(sequences))


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each target in nats: (tokens,), float32 or wider.

    Args:
        logits: (tokens, vocabulary), any floating dtype.
        targets: (tokens,) int64.
    """
    normalizers = log_normalizers(logits)
    return normalizers - logits.gather(1, targets[:, None])[:, 0].to(normalizers.dtype)


def log_normalizers(logits: torch.Tensor) -> torch.Tensor:
    """Return log(sum(exp(logits))) over the vocabulary: (tokens,), float32 or wider.

    Args:
        logits: (tokens, vocabulary), converted to float32 in chunks of at most 64 MiB.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.cat([part.to(dtype).logsumexp(1) for part in logits.split(chunk_rows(logits))])


def chunk_rows(logits: torch.Tensor) -> int:
    """Return how many rows of logits to convert to float32 at once."""
    return max(1, _CHUNK_LOGITS.get(logits.device.type, 1 << 20) // logits.shape[1])
