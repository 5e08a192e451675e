"""Run the same measurements on several models with the same held-out rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from gptj8.dataset.prepared.conversation_encoder import ConversationEncoder
from gptj8.dataset.prepared.conversations import Conversation
from gptj8.dataset.prepared.prompts import PromptEncoder, room_for_answer
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.formats import read_texts
from gptj8.evaluation.metrics import (
    classification_metrics,
    divergence_metrics,
    generation_metrics,
    likelihood_metrics,
    perplexity_metrics,
)
from gptj8.evaluation.systems import WROTE
from gptj8.model.generation.answers import Answer, write_answers
from gptj8.model.generation.batch import Sampling
from gptj8.model.scoring.divergence import Divergence, NextTokens, compared_documents
from gptj8.model.scoring.likelihood import score_labels_in_shares
from gptj8.model.scoring.perplexity import DocumentScores, score_documents
from gptj8.model.scoring.probabilities import label_probabilities
from gptj8.runtime.distributed import each_a_share
from gptj8.runtime.errors import UserError
from gptj8.runtime.machine import peak_memory_gib, reset_peak_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Documents:
    """Tokenized documents that perplexity is measured on.

    Attributes:
        ids: token ids of each document, including the tokens before the first scored one.
        starts: first position to score in each document.
        spans: the spans to score, for documents with several answers; None: all from `starts`.
    """

    ids: list[list[int]]
    starts: list[int]
    spans: list[list[int]] | None = None

    @classmethod
    def of_texts(cls, texts: Sequence[str], encoder: TextEncoder) -> Documents:
        """Return documents with every token scored, after a BOS or end-of-text token."""
        begin = encoder.prefix_ids or [encoder.eos_id]
        ids = [begin + ids for ids in encoder.encode_batch(list(texts))]
        return cls(ids, [len(begin)] * len(ids))

    @classmethod
    def of_completions(cls, rows: Sequence[tuple[str, str]], prompts: PromptEncoder) -> Documents:
        """Return documents with only the completions and their end tokens scored, as in training.

        Args:
            rows: (prompt, completion) pairs.
            prompts: encoder of the prompts.
        """
        examples = [prompts.example(prompt, completion) for prompt, completion in rows]
        begin = [prompts.encoder.eos_id]  # for prompts without tokens
        return cls(
            [e.ids if e.prompt_length else begin + e.ids for e in examples],
            [max(1, e.prompt_length) for e in examples],
        )

    @classmethod
    def of_conversations(
        cls, conversations: Sequence[str], encoder: ConversationEncoder
    ) -> Documents:
        """Return documents with the answers scored that are learned in training.

        Of a conversation whose earlier answers are rewritten, only the last answer is scored.

        Args:
            conversations: as `Conversation.to_json` writes them.
            encoder: encoder of the conversations.
        """
        read = map(Conversation.from_json, conversations)
        examples = [encoder.encode(conversation).examples[-1] for conversation in read]
        ids = [example[: learned[-1]] for example, learned in examples]
        spans = [[max(1, place) for place in learned] for _, learned in examples]
        return cls(ids, [learned[0] for learned in spans], spans)


def held_out_documents(
    task: str,
    test: pd.DataFrame,
    prompts: PromptEncoder,
    *,
    path: str | None = None,
    text_column: str = "text",
    limit: int | None = None,
    conversations: ConversationEncoder | None = None,
) -> tuple[pd.DataFrame, Documents]:
    """Return the rows that perplexity is measured on, with `file` and `row`, and their documents.

    Args:
        task: `classification`, `completion` or `text`.
        test: the test split, which is used unless `path` is given.
        prompts: encoder of the prompts of completions.
        path: a file of held-out text.
        text_column: column of the text in `path`.
        limit: maximum number of rows, from the start; None uses all rows.
        conversations: encoder of the rows, if they are conversations.

    Raises:
        UserError: if there is no text.
    """
    if path is None and task == "completion":
        rows = test.head(limit or len(test))
        if conversations is not None:
            return rows, Documents.of_conversations(rows["conversation"], conversations)
        pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
        return rows, Documents.of_completions(pairs, prompts)
    rows = test if path is None else read_texts(path, text_column)
    rows = rows[rows["text"].fillna("").str.strip() != ""].head(limit or len(rows))
    if rows.empty:
        source = "the test split" if path is None else f"evaluate.perplexity_text = {path}"
        raise UserError(f"{source}: no text found")
    return rows, Documents.of_texts(rows["text"], prompts.encoder)


@dataclass(frozen=True)
class Questions:
    """Encoded prompts and correct answers of the test rows, used for every system.

    Attributes:
        encoder: decodes generated answers.
        prompts: token ids of each prompt; empty for the task `text`.
        answers: (rows,) correct answers, labels or completions.
        labels: all labels; empty unless the task is `classification`.
        label_ids: token ids of each label, including its end token.
        max_new_tokens: maximum length of a generated answer, including its end token.
        generated_rows: number of rows, from the start, for which answers are generated.
        end_ids: tokens that end a generated answer.
    """

    encoder: TextEncoder
    prompts: list[list[int]]
    answers: Sequence[str]
    labels: Sequence[str]
    label_ids: list[list[int]]
    max_new_tokens: int
    generated_rows: int
    end_ids: tuple[int, ...] = ()

    @classmethod
    def of_rows(
        cls,
        task: str,
        test: pd.DataFrame,
        labels: Sequence[str],
        prompts: PromptEncoder,
        *,
        max_new_tokens: int,
        max_generated_rows: int | None = None,
        conversations: ConversationEncoder | None = None,
    ) -> Questions:
        """Encode the test rows once for all systems; prompts leave room for every label.

        Args:
            task: `classification`, `completion` or `text`.
            test: the test split.
            labels: all labels.
            prompts: encoder of the prompts.
            max_new_tokens: maximum length of a completion, limited to half of the maximum length of
                `prompts`. For a classification, the length of the longest label is used instead.
            max_generated_rows: maximum number of generated answers; None uses all rows.
            conversations: encoder of the rows, if they are conversations.
        """
        encoded = prompts.labels(labels)
        texts, answers = {
            "classification": ("text", "label"),
            "completion": ("prompt", "completion"),
        }.get(task, (None, None))
        if texts is None:
            return cls(prompts.encoder, [], [], (), [], 0, 0)
        tokens = room_for_answer(max_new_tokens, prompts.max_length, encoded.longest)
        if conversations is None:
            ids = [prompts.prompt(text, tokens, labels=encoded).ids for text in test[texts]]
        else:
            read = map(Conversation.from_json, test["conversation"])
            ids = [conversations.prompt_to_answer(found, tokens) for found in read]
        # An empty prompt is replaced by the end-of-text token.
        ids = [prompt or [prompts.encoder.eos_id] for prompt in ids]
        ends = conversations.end_ids if conversations else prompts.encoder.end_ids
        rows = len(ids) if max_generated_rows is None else min(max_generated_rows, len(ids))
        return cls(
            prompts.encoder, ids, list(test[answers]), labels, encoded.ids, tokens, rows, ends
        )


@dataclass
class Comparison:
    """Scores and answers of all measured systems, by system name.

    Attributes:
        documents: documents for perplexity.
        questions: prompts and answers for accuracy.
        batch_size: maximum number of rows per forward pass.
        scores: system -> scores of the documents.
        likelihoods: system -> (test rows, labels) float64, log-likelihoods in nats.
        predictions: system -> (test rows,) labels.
        generated: system -> generated texts for the first rows.
        confidences: system -> probability of each predicted label; `<system>_wrote` -> confidence
            of each generated text (`gptj8.model.generation.answers.confidence_of`).
        divergences: system -> its distance from the original model.
        costs: `<system>/seconds`, `<system>/tokens_per_second` (for perplexity) and
            `<system>/peak_memory_gib`.
    """

    documents: Documents
    questions: Questions
    batch_size: int
    scores: dict[str, DocumentScores] = field(default_factory=dict)
    likelihoods: dict[str, np.ndarray] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    generated: dict[str, list[str]] = field(default_factory=dict)
    confidences: dict[str, list[float]] = field(default_factory=dict)
    divergences: dict[str, Divergence] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    _original: NextTokens | None = None
    _compared: int = 0
    _scoring_seconds: float = 0.0

    @contextmanager
    def costing(self, system: str) -> Iterator[None]:
        """Measure time and peak memory of a `with` block, which includes loading the model."""
        reset_peak_memory()
        started = time.perf_counter()
        yield
        self.costs[f"{system}/seconds"] = time.perf_counter() - started
        self.costs[f"{system}/peak_memory_gib"] = peak_memory_gib()
        # The hooks that read layers from disk keep a model alive through reference cycles.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def measure(self, system: str, model: Model) -> None:
        """Measure perplexity and, if there are prompts, accuracy."""
        started = time.perf_counter()
        ids, starts, spans = self.documents.ids, self.documents.starts, self.documents.spans

        def score(numbers: Sequence[int]) -> list[tuple[float, int]]:
            found = score_documents(
                model,
                [ids[i] for i in numbers],
                [starts[i] for i in numbers],
                batch_size=self.batch_size,
                description=f"{system}: perplexity",
                spans=None if spans is None else [spans[i] for i in numbers],
            )
            return list(zip(found.nll, found.tokens, strict=True))

        nll, tokens = zip(*each_a_share(score, len(ids)), strict=True)
        scores = DocumentScores(np.array(nll), np.array(tokens))
        seconds = time.perf_counter() - started
        self.scores[system] = scores
        self.costs[f"{system}/tokens_per_second"] = float(scores.tokens.sum()) / seconds
        self._scoring_seconds += seconds
        if self.questions.prompts:
            self.ask(system, model, self.questions.prompts)

    def remember(self, system: str, model: Model) -> None:
        """Keep the next-token distributions of the original model for `compare`."""

        ids, starts = compared_documents(self.documents.ids, self.documents.starts, model.config)
        self._compared = len(ids)

        def keep(numbers: Sequence[int]) -> list[None]:
            # Each process keeps those of its own share, which is the same in `compare`.
            self._original = NextTokens(
                model,
                [ids[i] for i in numbers],
                [starts[i] for i in numbers],
                batch_size=self.batch_size,
                description=f"{system}: distributions",
            )
            return [None] * len(numbers)

        each_a_share(keep, self._compared)

    def compare(self, system: str, model: Model) -> None:
        """Measure how far the next-token distributions are from those of `remember`."""

        def divergence(numbers: Sequence[int]) -> list[tuple[float, float, int]]:
            assert self._original is not None
            found = self._original.compare(model, f"{system}: divergence")
            return list(zip(found.kl, found.same, found.tokens, strict=True))

        if found := each_a_share(divergence, self._compared):
            kl, same, tokens = (np.array(column) for column in zip(*found, strict=True))
            self.divergences[system] = Divergence(kl, same, tokens)
        self._original = None  # frees the file

    def ask(self, system: str, model: Model, prompts: Sequence[Sequence[int]]) -> None:
        """Predict the most likely label for each prompt, and generate answers to the first ones."""
        questions = self.questions
        if questions.labels:
            likelihoods = score_labels_in_shares(
                model,
                prompts,
                questions.label_ids,
                batch_size=self.batch_size,
                description=f"{system}: labels",
            )
            self.likelihoods[system] = likelihoods
            labels = np.array(questions.labels, dtype=object)
            self.predictions[system] = labels[likelihoods.argmax(1)]
            self.confidences[system] = label_probabilities(likelihoods).max(axis=1).tolist()
        if questions.generated_rows:

            def write(numbers: Sequence[int]) -> list[Answer]:
                return write_answers(
                    model,
                    [prompts[i] for i in numbers],
                    questions.encoder,
                    samplings=[Sampling(questions.max_new_tokens)] * len(numbers),
                    batch_size=self.batch_size,
                    description=f"{system}: answers",
                    end_ids=questions.end_ids,
                )

            answers = each_a_share(write, questions.generated_rows)
            self.generated[system] = [answer.text for answer in answers]
            self.confidences[f"{system}{WROTE}"] = [answer.confidence for answer in answers]

    def metrics(self, resamples: int, seed: int) -> dict[str, float]:
        """Return all metrics as `<system>/<metric>`; see `gptj8.evaluation.metrics`.

        Args:
            resamples: number of bootstrap samples.
            seed: seed of the bootstraps.
        """
        labels, answers = self.questions.labels, self.questions.answers
        metrics = perplexity_metrics(self.scores, resamples=resamples, seed=seed)
        metrics |= divergence_metrics(self.divergences, resamples=resamples, seed=seed)
        if labels:
            metrics |= classification_metrics(
                labels, answers, self.predictions, resamples=resamples, seed=seed
            )
            tokens = [len(ids) for ids in self.questions.label_ids]
            metrics |= likelihood_metrics(labels, tokens, answers, self.likelihoods)
        metrics |= generation_metrics(answers, self.generated)
        metrics |= self.costs
        scored = sum(int(scores.tokens.sum()) for scores in self.scores.values())
        metrics["tokens_per_second"] = scored / self._scoring_seconds
        return metrics
