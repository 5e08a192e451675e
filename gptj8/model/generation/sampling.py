"""Choose the next token of a row from its logits.

The log probabilities are those of the model, before `temperature`, `top_k` and `top_p` change
them, so they can be compared between requests with different settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one row.

    Attributes:
        max_new_tokens: maximum number of new tokens, including the end token.
        temperature: divisor of the logits; 0 selects the most likely token.
        top_k: sample from the k most likely tokens; 0 disables the limit.
        top_p: sample from the most likely tokens whose total probability reaches this value.
        seed: the same seed gives the same tokens; None uses a random seed.
        logprobs: number of most likely tokens whose log probabilities are kept for each new token,
            beside its own; None keeps none.
        end_ids: tokens that end this row, beside those of its batch.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    end_ids: tuple[int, ...] = ()


class TokenLogprobs(NamedTuple):
    """Log probabilities, in nats, where one token was chosen.

    Attributes:
        chosen: of the chosen token.
        top: the most likely token ids with theirs, the most likely first.
    """

    chosen: float
    top: list[tuple[int, float]]


class Sampler:
    """Choose the tokens of one row.

    Args:
        sampling: settings of the row.
        device: device of the logits.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._logprobs = sampling.logprobs
        self._warpers: LogitsProcessorList | None = None
        if sampling.temperature <= 0:
            return
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor, best: int, before: Sequence[int]) -> int:
        """Return the id of the next token.

        Args:
            logits: (1, vocabulary) float32.
            best: the id with the largest logit.
            before: ids generated so far.
        """
        if self._warpers is None:
            return best
        seen = torch.tensor([before])  # required by the API, unused by these warpers
        scores = self._warpers(seen, logits)  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(1), 1, generator=self._generator))

    def logprobs(self, logits: torch.Tensor, token: int) -> TokenLogprobs | None:
        """Return the log probabilities of a chosen token, if the row asks for them.

        Args:
            logits: (1, vocabulary) float32.
            token: the chosen id.
        """
        if self._logprobs is None:
            return None
        found = logits[0].log_softmax(0)
        top = found.topk(min(self._logprobs, len(found)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenLogprobs(float(found[token]), list(pairs))
