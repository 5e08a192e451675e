r"""Classification by label likelihood: choose the most likely label given the prompt.

    score(label) = sum over its tokens of log p(token | prompt, previous tokens)
    prediction   = the label with the highest score

The prediction is always one of the labels. The end token is part of each label
(`PromptEncoder.labels`), so a label that is a prefix of another one has no advantage.

All labels are scored in one forward pass per batch. Their tokens are packed side by side after the
prompt, each at the position that it would have if its label followed the prompt directly. The
attention mask lets a token see only the prompt and its own label:

                 prompt   sql EOS   sql alchemy EOS         columns
    prompt       causal    .   .     .     .     .
    sql           all      x   .     .     .     .
    sql           all      .   .     x     .     .
    alchemy       all      .   .     x     x     .          (EOS is a target, never an input)

The prompt is read and the 8-bit weights are dequantized once instead of once per label, and no
key-value cache of a complete batch is needed, which would take 0.46 MB per token for GPT-J-6B. If
all prompts start with the same tokens (few-shot examples), the keys and values of this prefix are
computed once and shared. Alternative considered: scoring the labels one after another on a cache
that is cropped after each; it was rejected because it computes the same tokens and needs one pass
over the weights per label.

Packing requires a model that applies the attention mask and `position_ids` as given, which is
tested for the architectures in `_PACKABLE`. Other models are scored with one row per pair of prompt
and label.
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
    from gptj8.dataset.prepared.text_encoder import TextEncoder

    Model = PreTrainedModel | PeftModel

_PACKABLE = {"gptj", "gpt2", "gpt_neox", "llama"}
_PACKED_LABEL_TOKENS = 256
_SHARED_PREFIX_TOKENS = 16  # a shorter common prefix is not worth a separate forward pass
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
    """Return the log-likelihood of each label after each prompt.

    Args:
        model: model in eval mode.
        prompts: non-empty lists of token ids that leave room for the longest label.
        labels: token ids of each label, including its end token.
        batch_size: maximum number of prompts per forward pass.
        description: label of the progress bar; None disables it.

    Returns:
        (prompts, labels) float64: log-likelihoods in nats, summed over the tokens of a label.

    Raises:
        ValueError: if a prompt is empty.
        UserError: if a likelihood is not finite, for example because float16 overflows.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt has no tokens")
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
    """Return the result of `score_labels` for any causal model, with one row per prompt and label.

    This is slower, but does not require a packable model.
    """
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
    """Return the result of `score_labels`, with the prompts distributed over all processes."""

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
    """Return the share of prompts whose most likely label has the index in `actual`."""
    scores = score_labels_in_shares(
        model, prompts, labels, batch_size=batch_size, description=description
    )
    return float((scores.argmax(1) == np.asarray(actual)).mean())


def accuracy_on_validation(
    dataset: PreparedDataset, encoder: TextEncoder, max_length: int, limit: int | None
) -> Callable[[Model, int], float] | None:
    """Return a function that measures accuracy by label likelihood on the validation split.

    Token accuracy under teacher forcing is not used, because it approaches 1 long before any answer
    is correct.

    Args:
        dataset: the prepared dataset.
        encoder: text encoder of the model.
        max_length: maximum number of tokens of prompt and label together.
        limit: maximum number of rows; None uses all rows.

    Returns:
        A function of the model and the batch size, or None if the task has no labels.
    """
    if not dataset.labels:
        return None
    rows = dataset.split("validation")
    rows = rows.head(limit or len(rows))
    prompts = dataset.prompt_encoder(encoder, max_length)
    labels = prompts.labels(dataset.labels)
    ids = [prompts.prompt(text, labels.longest, labels=labels).ids for text in rows["text"]]
    actual = [dataset.labels.index(label) for label in rows["label"]]
    return lambda model, batch_size: label_accuracy(
        model, ids, labels.ids, actual, batch_size=batch_size, description="validation accuracy"
    )


def is_packable(model: Model) -> bool:
    """Return whether the labels can be packed after one prompt for this model."""
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    return config.model_type in _PACKABLE and attention in {"eager", "sdpa"}


class _PackedLabels:
    """The packed tokens of several labels, and the place where each token is predicted.

    Each row of a batch has predictions at 1 + width places: place 0 is the last token of the
    prompt, place 1 + c is column c. A label of n tokens has n - 1 input tokens and n predictions.

    Attributes:
        count: number of labels.
        width: number of packed input tokens.
        ids: (width,) int64, input tokens.
        offsets: (width,) int64, position of each input token, counted from the end of the prompt.
        visible: (width, width) bool, whether row may attend to column: only to earlier tokens of
            the same label and to itself.
        places, targets, owners: (tokens of all labels,) int64: the place where a token is
            predicted, the token, and the index of its label.
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
    """Return scores (rows, labels) float64; `tails` are the prompts without their common prefix."""
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
    # One reduction per place; place 0 is shared by the first tokens of all labels.
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
    """Return the attention mask, (rows, 1, longest + width, prefix + longest + width)."""
    rows, width, device = len(lengths), len(labels_visible), lengths.device
    size = longest + width
    seen = torch.zeros(rows, 1, size, prefix_length + size, dtype=torch.bool, device=device)
    seen[..., :prefix_length] = True
    prompt = seen[..., prefix_length : prefix_length + longest]
    # Padding tokens attend to earlier tokens, because a softmax row must not be empty. Their
    # outputs are not used.
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
    """Return the common prefix of all prompts, or nothing if it is too short to share.

    At least one token of each prompt is left out of the prefix.
    """
    if len(prompts) < 2:
        return []
    low, high = (
        min(map(list, prompts)),
        max(map(list, prompts)),
    )  # in sorted order, the first and the last prompt share the shortest prefix
    limit = min(map(len, prompts)) - 1
    length = next((i for i in range(limit) if low[i] != high[i]), limit)
    return list(low[:length]) if length >= _SHARED_PREFIX_TOKENS else []


def _read_prefix(model: Model, prefix: Sequence[int]) -> DynamicCache | None:
    if not prefix:
        return None
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _repeat_cache(cache: DynamicCache | None, rows: int) -> DynamicCache | None:
    """Return a copy of the cache for `rows` rows, which the model may extend."""
    if cache is None:
        return None
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(rows)
    return repeated


def _rows_that_fit(model: Model, places: int, cache: DynamicCache | None) -> int:
    """Return the maximum number of rows within the limits for logits and for the repeated cache."""
    rows = MAX_LOGITS // (places * model.config.vocab_size)
    if cache is not None:
        layers: list[Any] = cache.layers
        tensors = [t for layer in layers for t in (layer.keys, layer.values)]
        rows = min(rows, _CACHE_BYTES // sum(t.numel() * t.element_size() for t in tensors))
    return max(1, rows)


def _group_labels(labels: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group label indices; a group has one label or at most `_PACKED_LABEL_TOKENS` tokens."""
    groups: list[list[int]] = []
    tokens = 0
    for index, label in enumerate(labels):
        if not groups or tokens + len(label) > _PACKED_LABEL_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += len(label)
    return groups
