"""The same held-out rows put before one model after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gptj8.evaluation.likelihood import score_labels
from gptj8.evaluation.perplexity import DocumentScores, score_documents
from gptj8.evaluation.statistics import perplexity_ratio
from gptj8.prompts import PromptEncoder, TextEncoder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Documents:
    """What perplexity is measured on.

    Attributes:
        ids: token ids of each document, with what comes before its first scored token.
        starts: the first position to score in each.
    """

    ids: list[list[int]]
    starts: list[int]

    @classmethod
    def of_texts(cls, texts: Sequence[str], encoder: TextEncoder) -> Documents:
        """Score every token of each text; the first one follows BOS, or else end-of-text."""
        begin = encoder.prefix_ids or [encoder.eos_id]
        ids = [begin + ids for ids in encoder.encode_batch(list(texts))]
        return cls(ids, [len(begin)] * len(ids))

    @classmethod
    def of_completions(cls, rows: Sequence[tuple[str, str]], prompts: PromptEncoder) -> Documents:
        """Score each completion, its end included, given its prompt, as in training."""
        examples = [prompts.example(prompt, completion) for prompt, completion in rows]
        begin = [prompts.encoder.eos_id]  # for a prompt without a single token
        return cls(
            [e.ids if e.prompt_length else begin + e.ids for e in examples],
            [max(1, e.prompt_length) for e in examples],
        )


@dataclass
class Comparison:
    """Scores and predictions of each system measured, by its name.

    Attributes:
        documents: for perplexity.
        labels: in the order of `label_ids`; empty where there is nothing to classify.
        prompts: (test rows) token ids, for classification.
        label_ids: token ids of each label with its end.
        batch_size: most rows in one forward pass.
        scores: system -> what it makes of each document.
        likelihoods: system -> (test rows, labels) float64.
        predictions: system -> (test rows,) labels.
        scoring_seconds: spent on perplexity, of all systems together.
    """

    documents: Documents
    labels: Sequence[str]
    prompts: list[list[int]]
    label_ids: list[list[int]]
    batch_size: int
    scores: dict[str, DocumentScores] = field(default_factory=dict)
    likelihoods: dict[str, np.ndarray] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    scoring_seconds: float = 0.0

    def measure(self, system: str, model: Model) -> None:
        """Measure perplexity, and accuracy where there are labels."""
        started = time.perf_counter()
        self.scores[system] = score_documents(
            model,
            self.documents.ids,
            self.documents.starts,
            batch_size=self.batch_size,
            description=f"{system}: perplexity",
        )
        self.scoring_seconds += time.perf_counter() - started
        if self.labels:
            self.classify(system, model, self.prompts)

    def classify(self, system: str, model: Model, prompts: list[list[int]]) -> None:
        """Predict the likeliest label after each prompt."""
        likelihoods = score_labels(
            model,
            prompts,
            self.label_ids,
            batch_size=self.batch_size,
            description=f"{system}: labels",
        )
        self.likelihoods[system] = likelihoods
        self.predictions[system] = np.array(self.labels, dtype=object)[likelihoods.argmax(1)]

    def metrics(self, actual: Sequence[str], resamples: int, seed: int) -> dict[str, float]:
        """Return `<system>/perplexity`, `/accuracy`, `/macro_f1` and the quantized model's ratio.

        Args:
            actual: (test rows,) the true labels.
            resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        from sklearn.metrics import accuracy_score, f1_score

        metrics = {f"{system}/perplexity": s.perplexity for system, s in self.scores.items()}
        if {"base", "quantized"} <= self.scores.keys():
            base, quantized = self.scores["base"], self.scores["quantized"]
            ratio = perplexity_ratio(
                quantized.nll,
                base.nll,
                base.tokens,
                resamples=resamples,
                rng=np.random.default_rng(seed),
            )
            metrics["quantized/perplexity_ratio"] = ratio.value
            metrics["quantized/perplexity_ratio_low"] = ratio.low
            metrics["quantized/perplexity_ratio_high"] = ratio.high
        for system, predicted in self.predictions.items():
            metrics[f"{system}/accuracy"] = float(accuracy_score(actual, predicted))
            metrics[f"{system}/macro_f1"] = float(
                f1_score(actual, predicted, labels=self.labels, average="macro", zero_division=0)
            )
        scored = sum(int(scores.tokens.sum()) for scores in self.scores.values())
        metrics["tokens_per_second"] = scored / self.scoring_seconds
        return metrics


def compare_on(
    test: pd.DataFrame,
    labels: Sequence[str],
    prompts: PromptEncoder,
    documents: Documents,
    batch_size: int,
) -> Comparison:
    """Encode the test rows once, for all systems; zero-shot prompts leave room for any label."""
    label_ids = [prompts.completion_ids(label) for label in labels]
    reserve = max(map(len, label_ids), default=0)
    ids = [prompts.prompt(text, reserve).ids for text in test["text"]] if labels else []
    return Comparison(documents, labels, ids, label_ids, batch_size)
