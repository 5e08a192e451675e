r"""Classification by label likelihood: the label that the model finds likeliest after the prompt.

    score(label) = sum over its tokens of log p(token | prompt, tokens before)
    prediction   = the label with the highest score

So the answer is always one of the labels, and no label can win by being cut short, because its end
token is part of it (`PromptEncoder.completion_ids`).

All labels are scored in one forward pass a batch. Their tokens stand side by side behind the
prompt, each at the position it would have on its own, and the attention mask lets them see the
prompt and their own label only:

                 prompt   sql EOS   sql alchemy EOS         columns
    prompt       causal    .   .     .     .     .
    sql           all      x   .     .     .     .
    sql           all      .   .     x     .     .
    alchemy       all      .   .     x     x     .          (an EOS is predicted, never read)

The prompt is read once instead of once a label, frozen 8-bit weights are restored once instead of
once a label, and no key-value cache of a whole batch is held: for GPT-J-6B that would be 0.46 MB a
token. Prompts that begin alike (few-shot examples) share the computation of that beginning through
a cache that is computed once. (Rejected: scoring label after label on a cache that is cropped back,
with the same tokens to compute and a pass over the weights for each label.)

The mask is only right for models whose attention follows it and whose positions follow
`position_ids`; that is tested for the architectures in `_PACKABLE`. All others are scored the plain
way, one row for each pair of prompt and label.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gptj8.model.scoring.batching import (
    MAX_LOGITS,
    for_each_batch,
    max_batch_tokens,
    pad_right,
    plan_batches,
)
from gptj8.model.scoring.perplexity import log_normalizers, score_sequences
from gptj8.runtime.distributed import each_a_share
from gptj8.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import DynamicCache, PreTrainedModel

    from gptj8.dataset.prepared.dataset import PreparedDataset
    from gptj8.dataset.prepared.prompts import TextEncoder

    Model = PreTrainedModel | PeftModel

_PACKABLE = {"gptj", "gpt2", "gpt_neox", "llama"}
_PACKED_LABEL_TOKENS = 256
_SHARED_PREFIX_TOKENS = 16  # a shorter common beginning is not worth a pass of its own
_CACHE_BYTES = 1 << 28


@torch.inference_mode()
def score_labels(
    model: Model,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
    description: str | None = "classification",
) -> np.ndarray:
    """Return each label's log-likelihood after each prompt.

    Args:
        model: in eval mode.
        prompts: token ids, each at least one and short enough for the longest label to follow.
        labels: token ids of each label, its end token included.
        batch_size: most prompts in one forward pass.
        description: of the progress bar; None: no bar.

    Returns:
        (prompts, labels) float64: natural logarithms, summed over a label's tokens.

    Raises:
        ValueError: if a prompt is empty, and its label would be conditioned on nothing.
        UserError: if a likelihood is not a number, as when float16 overflows.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt has no token")
    if not is_packable(model):
        return score_labels_one_by_one(
            model, prompts, labels, batch_size=batch_size, description=description
        )
    prefix = _common_prefix(prompts)
    cache = _read_prefix(model, prefix)
    tails = [prompt[len(prefix) :] for prompt in prompts]
    scores = np.zeros((len(prompts), len(labels)))
    groups = _group_labels(labels)
    for number, group in enumerate(groups, start=1):
        packed = _PackedLabels([labels[i] for i in group], model.device)
        part = f" {number}/{len(groups)}" if len(groups) > 1 else ""

        def score(batch: list[int], packed=packed, group=group) -> None:  # type: ignore[no-untyped-def]
            rows = [tails[i] for i in batch]
            scores[np.ix_(batch, group)] = _score_batch(model, rows, packed, len(prefix), cache)

        lengths = [len(tail) + packed.width for tail in tails]
        max_rows = min(batch_size, _rows_that_fit(model, packed.width + 1, cache))
        batches = plan_batches(lengths, max_rows, max_batch_tokens(model.device, 1))
        shown = description and description + part
        for_each_batch(batches, score, shown, len(prompts))
    if not np.isfinite(scores).all():
        raise UserError(
            f"{description or 'classification'}: the model's likelihoods are not finite; try "
            "model.dtype: float32"
        )
    return scores


def score_labels_one_by_one(
    model: Model,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
    description: str | None = "classification",
) -> np.ndarray:
    """Return what `score_labels` does, for any causal model: one row a pair of prompt and label."""
    pairs = [[*prompt, *label] for prompt in prompts for label in labels]
    starts = [len(prompt) for prompt in prompts for _ in labels]
    nll = score_sequences(model, pairs, starts, batch_size=batch_size, description=description)
    return -nll.reshape(len(prompts), len(labels))


def score_labels_in_shares(
    model: Model,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
    description: str | None,
) -> np.ndarray:
    """Return what `score_labels` does; of several processes each scores a share of the prompts."""

    def score(numbers: Sequence[int]) -> np.ndarray:
        mine = [prompts[i] for i in numbers]
        return score_labels(model, mine, labels, batch_size=batch_size, description=description)

    return np.array(each_a_share(score, len(prompts)))


def label_accuracy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    actual: Sequence[int],
    *,
    batch_size: int,
    description: str | None = None,
) -> float:
    """Return the share of prompts whose likeliest label is the one with the index `actual`."""
    scores = score_labels_in_shares(
        model, prompts, labels, batch_size=batch_size, description=description
    )
    return float((scores.argmax(1) == np.asarray(actual)).mean())


def accuracy_on_validation(
    dataset: PreparedDataset, encoder: TextEncoder, max_length: int, limit: int | None
) -> Callable[[Model, int], float] | None:
    """Return what measures a model's accuracy by label likelihood on the validation split, so many
    rows at a time; None if the task has no labels.

    Not the share of tokens that are the likeliest ones, given all right ones before: that is nearly
    1 long before any answer is right.

    Args:
        encoder: the model's.
        max_length: tokens of prompt and label together.
        limit: of rows; None: all.
    """
    if not dataset.labels:
        return None
    rows = dataset.split("validation")
    rows = rows.head(limit or len(rows))
    prompts = dataset.prompt_encoder(encoder, max_length)
    labels = [prompts.completion_ids(label) for label in dataset.labels]
    longest = max(map(len, labels))
    ids = [prompts.prompt(text, longest).ids for text in rows["text"]]
    actual = [dataset.labels.index(label) for label in rows["label"]]
    return lambda model, batch_size: label_accuracy(
        model, ids, labels, actual, batch_size=batch_size, description="validation accuracy"
    )


def is_packable(model: Model) -> bool:
    """Return whether labels may stand side by side behind one prompt."""
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    return config.model_type in _PACKABLE and attention in {"eager", "sdpa"}


class _PackedLabels:
    """The labels' tokens side by side, and where each one's prediction is found.

    The predictions for a row are made at 1 + width places: place 0 is the prompt's last token,
    place 1 + c is column c. A label of n tokens reads n - 1 of them and is predicted at n places.

    Attributes:
        ids: (width,) int64, the tokens to read.
        offsets: (width,) int64, a token's position counted from the prompt's end.
        visible: (width, width) bool, row may attend to column: the same label, not later.
        places, targets, owners: (tokens of all labels,) int64: where a token is predicted, the
            token, and its label's index.
    """

    def __init__(self, labels: Sequence[Sequence[int]], device: torch.device) -> None:
        ids: list[int] = []
        offsets: list[int] = []
        groups: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for owner, label in enumerate(labels):
            places += [0, *range(len(ids) + 1, len(ids) + len(label))]
            targets += label
            owners += [owner] * len(label)
            ids += label[:-1]
            offsets += range(len(label) - 1)
            groups += [owner] * (len(label) - 1)
        self.count, self.width = len(labels), len(ids)
        as_tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=device)  # noqa: E731
        self.ids, self.offsets = as_tensor(ids), as_tensor(offsets)
        self.places, self.targets, self.owners = map(as_tensor, (places, targets, owners))
        group = as_tensor(groups)
        self.visible = (group[:, None] == group) & (self.offsets[:, None] >= self.offsets)


def _score_batch(
    model: Model,
    tails: Sequence[Sequence[int]],
    labels: _PackedLabels,
    prefix_length: int,
    cache: DynamicCache | None,
) -> np.ndarray:
    """Return (rows, labels) float64 for prompts given without their common prefix."""
    rows, device = len(tails), model.device
    ids, lengths = pad_right(tails, device)
    longest = ids.shape[1]
    positions = torch.cat(
        [
            torch.arange(longest, device=device).expand(rows, -1),
            lengths[:, None] + labels.offsets,
        ],
        dim=1,
    )
    columns = torch.arange(labels.width, device=device) + longest
    kept = torch.cat([lengths[:, None] - 1, columns.expand(rows, -1)], dim=1)
    logits = model(
        input_ids=torch.cat([ids, labels.ids.expand(rows, -1)], dim=1),
        attention_mask=_attention_mask(model, lengths, longest, labels.visible, prefix_length),
        position_ids=positions + prefix_length,
        past_key_values=_repeat_cache(cache, rows),
        use_cache=cache is not None,
        logits_to_keep=kept,
    ).logits  # (rows, 1 + width, vocabulary)
    # One reduction a place: the first one serves the first token of every label.
    normalizers = log_normalizers(logits.flatten(0, 1)).view(rows, -1).double()
    token_scores = logits[:, labels.places, labels.targets].double() - normalizers[:, labels.places]
    scores = torch.zeros(rows, labels.count, dtype=torch.float64, device=device)
    return scores.index_add_(1, labels.owners, token_scores).cpu().numpy()


def _attention_mask(
    model: Model,
    lengths: torch.Tensor,
    longest: int,
    labels_visible: torch.Tensor,
    prefix_length: int,
) -> torch.Tensor:
    """Return (rows, 1, longest + width, prefix + longest + width), as the attention expects it."""
    rows, width, device = len(lengths), len(labels_visible), lengths.device
    size = longest + width
    seen = torch.zeros(rows, 1, size, prefix_length + size, dtype=torch.bool, device=device)
    seen[..., :prefix_length] = True
    prompt = seen[..., prefix_length : prefix_length + longest]
    # Padding sees what stands before it: what comes of it is used by nobody, and a row of the
    # softmax must not be empty.
    prompt[:, :, :longest] = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    real = torch.arange(longest, device=device) < lengths[:, None]
    prompt[:, :, longest:] = real[:, None, None, :]
    seen[..., longest:, prefix_length + longest :] = labels_visible
    if model.config._attn_implementation == "sdpa":
        return seen
    # Eager attention adds the mask to its scores.
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill_(
        ~seen, torch.finfo(torch.float32).min
    )


def _common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the ids that all prompts begin with, if worth the trouble; each keeps one or more."""
    if len(prompts) < 2:
        return []
    low, high = (
        min(map(list, prompts)),
        max(map(list, prompts)),
    )  # the pair that differs earliest, in sorted order
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if low[i] != high[i]), limit)
    return list(low[:length]) if length >= _SHARED_PREFIX_TOKENS else []


def _read_prefix(model: Model, prefix: Sequence[int]) -> DynamicCache | None:
    if not prefix:
        return None
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _repeat_cache(cache: DynamicCache | None, rows: int) -> DynamicCache | None:
    """Return a cache for `rows` rows that the model may add to; the original stays as it is."""
    if cache is None:
        return None
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated


def _rows_that_fit(model: Model, places: int, cache: DynamicCache | None) -> int:
    """Return how many rows keep the logits and the repeated cache within their bounds."""
    rows = MAX_LOGITS // (places * model.config.vocab_size)
    if cache is not None:
        layers: list[Any] = cache.layers
        tensors = [t for layer in layers for t in (layer.keys, layer.values)]
        rows = min(rows, _CACHE_BYTES // sum(t.numel() * t.element_size() for t in tensors))
    return max(1, rows)


def _group_labels(labels: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return label indices in groups of at most `_PACKED_LABEL_TOKENS` tokens, or one label."""
    groups: list[list[int]] = []
    tokens = 0
    for index, label in enumerate(labels):
        if not groups or tokens + len(label) > _PACKED_LABEL_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += len(label)
    return groups
