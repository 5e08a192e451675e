r"""How far the next-token distribution of a model is from that of another one.

    KL(original || model) = sum over the vocabulary of p_original (log p_original - log p_model)

averaged over the scored tokens, in nats. Unlike the ratio of perplexities, which can be below 1 by
chance, it is never negative and ranks storage formats in the same order on every text (llama.cpp
ranks its formats by it). The second measure is the share of tokens for which both models have the
same most likely next token.

The models need not be in memory at the same time: the log-probabilities of the original are kept in
an anonymous temporary file, over the full vocabulary and in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptj8.model.scoring.perplexity import chunk_rows, context_length, visit_logits
from gptj8.runtime.files import require_free_space

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Intervals are narrow with a few thousand tokens, and a vocabulary of 128,000 needs 0.5 MB each.
_TOKENS = 10_000
_BYTES = 1 << 30


@dataclass(frozen=True)
class Divergence:
    """Sums over the scored tokens of each document.

    Attributes:
        kl: (documents,) float64, KL divergence in nats.
        same: (documents,) float64, number of tokens with the same most likely next token.
        tokens: (documents,) int64, number of scored tokens.
    """

    kl: np.ndarray
    same: np.ndarray
    tokens: np.ndarray


def compared_documents(
    documents: Sequence[Sequence[int]], starts: Sequence[int], config: Any
) -> tuple[list[Sequence[int]], list[int]]:
    """Return the first documents with about 10,000 tokens to score, and their first positions.

    Fewer tokens are used if their distributions would exceed 1 GiB. What does not fit into the
    context of the model or into these limits is cut off.

    Args:
        documents: token ids, including those before the first scored one.
        starts: first position to score in each document.
        config: the model's config.
    """
    left = max(1, min(_TOKENS, _BYTES // (4 * config.vocab_size)))
    chosen, firsts = [], []
    for document, start in zip(documents, starts, strict=True):
        end = min(len(document), context_length(config) + 1, start + left)
        if end > start:
            chosen.append(document[:end])
            firsts.append(start)
            left -= end - start
    return chosen, firsts


class NextTokens:
    """Next-token log-probabilities of a model.

    Args:
        model: the original model, in eval mode.
        documents, starts: see `compared_documents`.
        batch_size: maximum number of documents per forward pass.
        description: label of the progress bar.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        documents: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_size: int,
        description: str = "distributions",
    ) -> None:
        self.documents, self.starts, self.batch_size = documents, starts, batch_size
        lengths = [len(d) - start for d, start in zip(documents, starts, strict=True)]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Not memory-mapped, because mapped pages count as memory of this process.
        self._file = tempfile.TemporaryFile(dir=".", buffering=0)
        self._is_reserved = False
        self._visit(model, self._store, description)

    def compare(
        self, model: PreTrainedModel | PeftModel, description: str = "divergence"
    ) -> Divergence:
        """Return the divergence of another model with the same vocabulary."""
        kl, same = np.zeros(len(self.documents)), np.zeros(len(self.documents))

        def compare(document: int, place: slice, logits: torch.Tensor) -> None:
            for at, actual in _log_probabilities(logits):
                self._file.seek((place.start + at) * actual.shape[1] * 4)
                read = np.fromfile(self._file, np.float32, actual.numel())
                expected = torch.from_numpy(read).view(actual.shape).to(actual.device)
                divergence = (expected.exp() * (expected - actual)).sum(1).double().sum()
                kl[document] += float(divergence)
                same[document] += float((expected.argmax(1) == actual.argmax(1)).sum())

        self._visit(model, compare, description)
        return Divergence(kl, same, np.diff(self.offsets))

    def _store(self, document: int, place: slice, logits: torch.Tensor) -> None:
        if not self._is_reserved:
            size = 4 * int(self.offsets[-1]) * logits.shape[1]
            require_free_space(".", size, "the next-token distributions")
            self._is_reserved = True
        for at, values in _log_probabilities(logits):
            self._file.seek((place.start + at) * logits.shape[1] * 4)
            values.cpu().numpy().tofile(self._file)

    def _visit(self, model, use, description: str) -> None:  # type: ignore[no-untyped-def]
        def visit(
            batch: Sequence[int], rows: torch.Tensor, logits: torch.Tensor, _: torch.Tensor
        ) -> None:
            counts = torch.bincount(rows, minlength=len(batch)).tolist()
            for document, part in zip(batch, logits.split(counts), strict=True):
                use(document, slice(*self.offsets[document : document + 2]), part)

        visit_logits(
            model,
            self.documents,
            self.starts,
            visit,
            batch_size=self.batch_size,
            description=description,
        )


def _log_probabilities(logits: torch.Tensor):  # type: ignore[no-untyped-def]
    """Yield the first row and the float32 log-probabilities of each chunk of logits."""
    at = 0
    for part in logits.split(chunk_rows(logits)):
        yield at, torch.log_softmax(part.float(), 1)
        at += len(part)
