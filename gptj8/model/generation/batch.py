"""Generation for rows that come and go: a batch that is joined and left between two tokens.

A step of a large model reads every weight, for one row as for eight. So rows that are asked for at
different times, with different prompts and settings, share their steps (continuous batching: Yu et
al., Orca, OSDI 2022): a new row's prompt is read in a pass of its own and its keys and values are
put beside those of the others; a finished row's are taken out, and nobody waits for the longest.

    keys of row 1   . . . a a a a a b b      padding on the left, so that all rows end, and grow,
    keys of row 2   a a a a a a a b b b      in the same column; positions are each row's own

transformers' own continuous batching needs attention that reads pages, which GPT-J has not, and its
`generate` keeps a batch until the last row of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

_GROWTH = 64  # columns that a cache grows by at the least


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many, the end token included.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: sample among so many of the likeliest; 0: among all.
        top_p: sample among the likeliest that together have this probability.
        seed: the same one gives the same tokens; None: chance.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class GeneratedRow:
    """One row as it grows.

    Attributes:
        prompt_length: tokens of the prompt.
        ids: generated so far, without the end token.
        finish_reason: `stop` at the end token, `length` at `max_new_tokens`; None: not finished.
    """

    prompt_length: int
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    _steps: int = 0
    _warpers: LogitsProcessorList | None = None
    _chance: torch.Generator | None = None


class GenerationBatch:
    """Rows that are generated together.

    Args:
        model: in eval mode; any causal model of transformers that keeps keys and values.
        vocab_size: ids from here on are never chosen. GPT-J has 50,400 rows for 50,257 tokens.
        eos_id: ends a row.

    Attributes:
        rows: those that are not finished, in the order in which they came.
    """

    def __init__(self, model: Model, vocab_size: int, eos_id: int) -> None:
        self.model = model
        self.rows: list[GeneratedRow] = []
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._cache: Cache | None = None

    @torch.inference_mode()
    def add(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> list[GeneratedRow]:
        """Read prompts and choose the first token of each.

        Args:
            prompts: ids, each at least one; with the new tokens within the model's context.
            samplings: one for each prompt.

        Returns:
            a row for each prompt, with its first token; some may be finished already.

        Raises:
            ValueError: if a prompt is empty.
            UserError: if the model's logits are not finite.

        Whatever is raised, the rows that were there go on, or, where memory ran out as the new ones
        joined them, are no longer in `rows`.
        """
        if not all(map(len, prompts)):
            raise ValueError("a prompt has no token")
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
            _new_row(len(prompt), sampling, device)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        self._choose(logits, added)  # before they join: its fault is not the others'
        if self._cache is None:
            self._cache = cache
        else:
            self._join(self._cache, cache)
        self.rows += added
        self._drop_finished()
        return added

    @torch.inference_mode()
    def step(self) -> list[GeneratedRow]:
        """Choose the next token of every row and return the rows; finished ones leave."""
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
        """Take a row out before its end; nothing happens if it has left."""
        if row in self.rows:
            self._keep([other is not row for other in self.rows])

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Return float32 (rows, vocabulary) behind the last column, and fill the cache."""
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
        likeliest = logits.argmax(1)
        # Of what is not finite, an argmax is a token like any other.
        if not bool(logits.gather(1, likeliest[:, None]).isfinite().all()):
            raise UserError("the model's logits are not finite; try model.dtype: float32")
        for index, (row, token) in enumerate(zip(rows, likeliest.tolist(), strict=True)):
            if row._warpers is not None:
                seen = torch.tensor([row.ids])  # no warper here looks at it
                scores = row._warpers(seen, logits[index : index + 1])  # type: ignore[arg-type]
                chosen = torch.multinomial(scores.softmax(1), 1, generator=row._chance)
                token = int(chosen)
            row._steps += 1
            if token == self._eos_id:
                row.finish_reason = "stop"
                continue
            row.ids.append(token)
            if row._steps >= row.sampling.max_new_tokens:
                row.finish_reason = "length"

    def _join(self, cache: Cache, added: Cache) -> None:
        try:
            _append(cache, added)
        except BaseException:  # some layers have the new rows and some have not
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
        except BaseException:  # some layers have lost the rows and some have not
            self.rows, self._cache = [], None
            raise


def generate_greedily(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int,
    eos_id: int,
) -> list[list[int]]:
    """Return the likeliest continuation of each prompt, without the end token, all in one batch."""
    batch = GenerationBatch(model, vocab_size, eos_id)
    rows = batch.add(prompts, [Sampling(max_new_tokens)] * len(prompts))
    while batch.rows:
        batch.step()
    return [row.ids for row in rows]


def cache_bytes_per_token(model: Model) -> int:
    """Return how much memory the keys and values of one token take, in all layers together; more
    than it is where queries share them."""
    config = model.config
    width = 2 * config.num_hidden_layers * config.hidden_size
    return width * torch.finfo(model.dtype).bits // 8


def _new_row(prompt_length: int, sampling: Sampling, device: torch.device) -> GeneratedRow:
    row = GeneratedRow(prompt_length, sampling)
    if sampling.temperature > 0:
        row._warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            row._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            row._warpers.append(TopPLogitsWarper(sampling.top_p))
        row._chance = torch.Generator(device)
        if sampling.seed is None:
            row._chance.seed()
        else:
            row._chance.manual_seed(sampling.seed)
    return row


class _GrowingLayer(DynamicLayer):
    """Keys and values with room behind them, (rows, heads, room, head_dim).

    transformers' own layer is copied whole for every token; this one when its room is used up.
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
            room = end + max(_GROWTH, end // 4)
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
        """Keep some rows, and of these the last `columns` columns."""
        rows = rows.to(self.keys.device)
        begin = self.length - columns
        self.keys, self.values = (
            filled[rows, :, begin : self.length] for filled in (self.keys, self.values)
        )
        self.length = columns

    def append(self, other: _GrowingLayer) -> None:
        """Put the rows of another layer below, all ending in the same column."""
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
    # Zeros and not what memory holds: masked or not, a NaN times nothing is a NaN.
    padded = filled.new_zeros((*filled.shape[:2], room, filled.shape[3]))
    padded[:, :, width - filled.shape[2] : width] = filled
    return padded
