"""Solved examples for few-shot prompts: from the training split only, balanced, seeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.runtime.errors import UserError


def select_examples(
    train: pd.DataFrame,
    labels: Sequence[str],
    count: int,
    seed: int,
    fits: Callable[[str], bool] = lambda text: True,
) -> list[tuple[str, str]]:
    """Choose `count` solved examples, the labels as evenly as `count` allows.

    Args:
        train: with columns `text` and `label`.
        labels: all labels; where `count` is no multiple of their number, chance decides which get
            one more.
        count: examples altogether; fewer only if the training split has no more.
        seed: of every choice and of the order.
        fits: whether a text is short enough; one that is not is used only for want of others.

    Returns:
        (text, label) pairs in random order, so that no label is always the last one read.
    """
    rng = np.random.default_rng(seed)
    candidates = {}
    for label in labels:
        texts = train.loc[train["label"] == label, "text"].to_numpy()
        candidates[label] = _Chooser(texts[rng.permutation(len(texts))], fits)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        before = len(chosen)
        for index in rng.permutation(len(labels)):
            text = candidates[labels[index]].take() if len(chosen) < count else None
            if text is not None:
                chosen.append((text, labels[index]))
        if len(chosen) == before:  # every text of every label is taken
            break
    return [chosen[index] for index in rng.permutation(len(chosen))]


class _Chooser:
    """Hands out texts in order: those that fit as they come, then those put aside."""

    def __init__(self, texts: Sequence[str], fits: Callable[[str], bool]) -> None:
        self._texts = iter(texts)
        self._too_long: list[str] = []
        self._fits = fits

    def take(self) -> str | None:
        for text in self._texts:
            if self._fits(text):
                return text
            self._too_long.append(text)
        return self._too_long.pop(0) if self._too_long else None


def few_shot_prompts(
    texts: Sequence[str],
    train: pd.DataFrame,
    labels: Sequence[str],
    prompts: PromptEncoder,
    *,
    count: int,
    seed: int,
) -> list[list[int]]:
    """Return the ids of a prompt for each text, the same solved examples before all of them.

    Examples are short enough to be shown whole beside the longest text, where the training split
    has such: a cut example teaches little, and prompts with the same beginning are computed once.

    Args:
        texts: to be classified.
        train: the training split, with columns `text` and `label`.
        labels: all labels.
        prompts: with the model's context as `max_length`, which examples and text share.
        count: examples before each text.
        seed: of the choice.

    Raises:
        UserError: if the context has no room for so many.
    """
    reserve = max(len(prompts.completion_ids(label)) for label in labels)
    longest = max(labels, key=lambda label: len(prompts.completion_ids(label)))
    try:
        overhead = len(prompts.prompt("", reserve, [("", longest)] * count).ids)
    except UserError:
        raise UserError(
            f"evaluate.few_shot = {count}: so many examples do not fit into the model's context of "
            f"{prompts.max_length} tokens; lower it"
        ) from None
    share = (prompts.max_length - reserve - overhead) // (count + 1)
    examples = select_examples(
        train,
        labels,
        count,
        seed,
        fits=lambda text: len(prompts.encoder.encode(text.strip())) <= share,
    )
    return [prompts.prompt(text, reserve, examples).ids for text in texts]
