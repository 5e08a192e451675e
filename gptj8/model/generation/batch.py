"""Continuous batching: rows can join or leave a batch between two tokens.

A decoding step of a large model reads every weight, no matter how many rows the batch has. Requests
that arrive at different times, with different prompts and settings, therefore share their steps (Yu
et al., Orca, OSDI 2022). The prompt of a new row is read in a separate forward pass, and its keys
and values are added to the cache of the batch. Finished rows are removed immediately, so no row
waits for the longest one.

    keys of row 1   . . . a a a a a b b      padded on the left, so all rows end and grow in
    keys of row 2   a a a a a a a b b b      the same column; each row has its own positions

Alternatives considered: the continuous batching of transformers requires paged attention, which
GPT-J does not support, and its `generate` keeps a batch until the last row is finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.cache_utils import Cache, DynamicLayer

from gptj8.model.generation.sampling import Sampler, Sampling, TokenLogprobs
from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

_GROWTH = 64  # minimum number of columns by which a cache grows


@dataclass(eq=False)
class GeneratedRow:
    """One row and the tokens generated for it so far.

    Attributes:
        prompt_length: number of tokens in the prompt.
        sampling: sampling settings of the row.
        sampler: chooses the row's tokens.
        ids: token ids generated so far, without the end token.
        logprobs: log-probability of each chosen token under the model, before temperature and
            limits, in nats. After `stop`, the last one is that of the end token.
        finish_reason: `stop` after the end token, `length` after `max_new_tokens` tokens, None
            while the row is unfinished.
        last_logprobs: log probabilities of the last of `ids`, if its settings ask for them.
    """

    prompt_length: int
    sampling: Sampling
    sampler: Sampler
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    last_logprobs: TokenLogprobs | None = None
    _steps: int = 0


class GenerationBatch:
    """A batch of rows that are generated together.

    Args:
        model: any causal model of transformers with a key-value cache, in eval mode.
        vocab_size: number of tokens; ids from this number on are never chosen. GPT-J has 50,400
            embedding rows for 50,257 tokens.
        eos_id: id of the end token, or of several.

    Attributes:
        rows: unfinished rows, in the order in which they were added.
    """

    def __init__(self, model: Model, vocab_size: int, eos_id: int | Collection[int]) -> None:
        self.model = model
        self.rows: list[GeneratedRow] = []
        self._vocab_size = vocab_size
        self._end_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id)
        self._cache: Cache | None = None

    @property
    def cache_tokens(self) -> int:
        """Number of tokens whose keys and values have memory, including padding and room."""
        cache = self._cache  # another thread may ask
        if cache is None:
            return 0
        keys = _layers(cache)[0].keys
        return keys.shape[0] * keys.shape[2]

    @torch.inference_mode()
    def add(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> list[GeneratedRow]:
        """Add prompts to the batch and choose the first token of each.

        If this method raises, the existing rows can continue. The exception is running out of
        memory while the caches are merged: `rows` is then empty.

        Args:
            prompts: non-empty lists of token ids. Prompt and new tokens together must fit into the
                context of the model.
            samplings: one per prompt.

        Returns:
            One row per prompt with its first token; a row may already be finished.

        Raises:
            ValueError: if a prompt is empty.
            UserError: if the logits of the model are not finite.
        """
        if not all(map(len, prompts)):
            raise ValueError("a prompt has no tokens")
        device = self.model.device
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        real = torch.arange(longest) >= (longest - lengths)[:, None]
        positions = (torch.arange(longest) - (longest - lengths)[:, None]).clamp(min=0)
        cache = Cache(layer_class_to_replicate=_GrowingLayer)
        logits = self._logits(ids, real.long().to(device), positions, cache)
        added = [
            GeneratedRow(len(prompt), sampling, Sampler(sampling, device))
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        self._choose(logits, added)  # before the merge, so an error does not affect the other rows
        if self._cache is None:
            self._cache = cache
        else:
            self._join(self._cache, cache)
        self.rows += added
        self._drop_finished()
        return added

    @torch.inference_mode()
    def step(self) -> list[GeneratedRow]:
        """Choose the next token of every row, remove finished rows and return all these rows."""
        advanced = list(self.rows)
        if not advanced or self._cache is None:
            return []
        device = self.model.device
        width = self._cache.get_seq_length()
        lengths = torch.tensor([row.prompt_length + row._steps - 1 for row in advanced])
        last = torch.tensor([[row.ids[-1]] for row in advanced])
        seen = torch.arange(width + 1) >= (width - lengths)[:, None]
        logits = self._logits(last, seen.long().to(device), lengths[:, None], self._cache)
        self._choose(logits, advanced)
        self._drop_finished()
        return advanced

    def remove(self, row: GeneratedRow) -> None:
        """Remove an unfinished row; a row that is not in the batch is ignored."""
        if row in self.rows:
            self._keep([other is not row for other in self.rows])

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Return the logits after the last column, (rows, vocabulary) float32; update the cache."""
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self._vocab_size]
        return logits.float()

    def _choose(self, logits: torch.Tensor, rows: Sequence[GeneratedRow]) -> None:
        best = logits.argmax(1)
        # argmax returns a valid token id even if the logits are NaN.
        if not bool(logits.gather(1, best[:, None]).isfinite().all()):
            raise UserError("the model's logits are not finite; try model.dtype: float32")
        tokens = [
            row.sampler.choose(logits[index : index + 1], token, row.ids)
            for index, (row, token) in enumerate(zip(rows, best.tolist(), strict=True))
        ]
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
        logprobs = (chosen - logits.logsumexp(1)).tolist()
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row._steps += 1
            row.logprobs.append(logprobs[index])
            if token in self._end_ids or token in row.sampling.end_ids:
                row.finish_reason = "stop"
                continue
            row.ids.append(token)
            row.last_logprobs = row.sampler.logprobs(logits[index : index + 1], token)
            if row._steps >= row.sampling.max_new_tokens:
                row.finish_reason = "length"

    def _join(self, cache: Cache, added: Cache) -> None:
        try:
            _append(cache, added)
        except BaseException:  # only some layers have the new rows
            self.rows, self._cache = [], None
            raise

    def _drop_finished(self) -> None:
        self._keep([row.finish_reason is None for row in self.rows])

    def _keep(self, kept: Sequence[bool]) -> None:
        if all(kept):
            return
        self.rows = [row for row, keep in zip(self.rows, kept, strict=True) if keep]
        if not self.rows or self._cache is None:
            self._cache = None
            return
        longest = max(row.prompt_length + row._steps - 1 for row in self.rows)
        try:
            for layer in _layers(self._cache):
                layer.select(torch.tensor(kept), longest)
        except BaseException:  # only some layers have dropped the rows
            self.rows, self._cache = [], None
            raise


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    vocab_size: int,
    eos_id: int | Collection[int],
) -> list[GeneratedRow]:
    """Return the continuation of each prompt, using one batch; `samplings` are one per prompt."""
    batch = GenerationBatch(model, vocab_size, eos_id)
    rows = batch.add(prompts, samplings)
    while batch.rows:
        batch.step()
    return rows


def generate_greedily(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int,
    eos_id: int | Collection[int],
) -> list[list[int]]:
    """Return the ids of the greedy continuation of each prompt without its end token."""
    samplings = [Sampling(max_new_tokens)] * len(prompts)
    rows = generate(model, prompts, samplings, vocab_size, eos_id)
    return [row.ids for row in rows]


def cache_tokens_needed(rows: int, longest: int) -> int:
    """Return the most `GenerationBatch.cache_tokens` that rows need until they are finished.

    Args:
        rows: number of rows in the batch.
        longest: the largest number of tokens of a prompt and its answer.
    """
    return rows * (longest + max(_GROWTH, longest // 4))


def cache_bytes_per_token(model: Model) -> int:
    """Return the memory of the keys and values of one token over all layers.

    With grouped-query attention this is an upper bound.
    """
    config = model.config
    width = 2 * config.num_hidden_layers * config.hidden_size
    return width * torch.finfo(model.dtype).bits // 8


class _GrowingLayer(DynamicLayer):
    """Keys and values in preallocated buffers, (rows, heads, capacity, head_dim).

    The base class copies the complete cache for every token; this class copies it only when the
    capacity is used up.
    """

    keys: torch.Tensor  # type: ignore[assignment]  # None only until the first update
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            room = cache_tokens_needed(1, end)
            self.keys, self.values = (
                _with_room(filled[:, :, : self.length], room) for filled in (self.keys, self.values)
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows: torch.Tensor, columns: int) -> None:
        """Keep the last `columns` columns of the rows where the mask `rows` is true."""
        rows = rows.to(self.keys.device)
        begin = self.length - columns
        self.keys, self.values = (
            filled[rows, :, begin : self.length] for filled in (self.keys, self.values)
        )
        self.length = columns

    def append(self, other: _GrowingLayer) -> None:
        """Append the rows of another layer; all rows end in the same column."""
        width = max(self.length, other.length)
        room = width + _GROWTH
        self.keys, self.values = (
            torch.cat([_padded(mine[:, :, : self.length], width, room), _padded(new, width, room)])
            for mine, new in (
                (self.keys, other.keys[:, :, : other.length]),
                (self.values, other.values[:, :, : other.length]),
            )
        )
        self.length = width


def _layers(cache: Cache) -> list[_GrowingLayer]:
    return cache.layers  # type: ignore[return-value]


def _append(cache: Cache, added: Cache) -> None:
    for layer, other in zip(_layers(cache), _layers(added), strict=True):
        layer.append(other)


def _with_room(filled: torch.Tensor, room: int) -> torch.Tensor:
    grown = filled.new_zeros((*filled.shape[:2], room, filled.shape[3]))
    grown[:, :, : filled.shape[2]] = filled
    return grown


def _padded(filled: torch.Tensor, width: int, room: int) -> torch.Tensor:
    # Not `new_empty`: uninitialized memory may hold NaN, and NaN times a masked weight of 0 is NaN.
    padded = filled.new_zeros((*filled.shape[:2], room, filled.shape[3]))
    padded[:, :, width - filled.shape[2] : width] = filled
    return padded
