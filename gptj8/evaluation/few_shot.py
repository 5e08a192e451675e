"""Build few-shot prompts with balanced, seeded examples from the training split."""

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
    """Choose `count` solved examples, balanced over the labels.

    Args:
        train: the training split, with columns `text` and `label`.
        labels: all labels. If `count` is not a multiple of their number, the labels with one more
            example are chosen at random.
        count: total number of examples; fewer are returned only if the training split has fewer.
        seed: seed of the choice and of the order.
        fits: returns whether a text is short enough; longer texts are used only if no others are
            left.

    Returns:
        (text, label) pairs in random order, so that the last example does not always have the same
        label.
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
        if len(chosen) == before:  # all texts are used up
            break
    return [chosen[index] for index in rng.permutation(len(chosen))]


class _Chooser:
    """Return texts one at a time: first those that fit, then the longer ones, each in order."""

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
    """Return the token ids of a prompt for each text, with the same solved examples in all prompts.

    If possible, the examples are short enough to fit completely next to the longest text. Truncated
    examples are less useful, and a common prefix is computed only once for all prompts.

    Args:
        texts: texts to classify.
        train: the training split, with columns `text` and `label`.
        labels: all labels.
        prompts: encoder whose `max_length` is the context of the model.
        count: number of examples per prompt.
        seed: seed of the choice.

    Raises:
        UserError: if the examples do not fit into the context.
    """
    encoded = prompts.labels(labels)
    reserve = encoded.longest
    longest = labels[[len(ids) for ids in encoded.ids].index(reserve)]
    try:
        overhead = len(prompts.prompt("", reserve, [("", longest)] * count).ids)
    except UserError:
        raise UserError(
            f"evaluate.few_shot = {count}: the examples do not fit into the model's context of "
            f"{prompts.max_length} tokens; lower it"
        ) from None
    share = (prompts.max_length - reserve - overhead) // (count + 1)
    examples = select_examples(
        train,
        labels,
        count,
        seed,
        fits=lambda text: len(prompts.encoder.encode(text)) <= share,
    )
    return [prompts.prompt(text, reserve, examples, encoded).ids for text in texts]
