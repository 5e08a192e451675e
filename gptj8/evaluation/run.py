"""The stage `evaluate`: baseline, original model, 8-bit copy, few-shot and tuned model.

All inputs are checked before the first model is loaded, and only one model is in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gptj8.dataset.prepared.dataset import PreparedDataset
from gptj8.dataset.prepared.prompts import PromptEncoder
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.evaluation.baseline import predict_with_tfidf
from gptj8.evaluation.few_shot import few_shot_prompts
from gptj8.evaluation.other_systems import read_predictions
from gptj8.evaluation.report import write_classification_reports, write_reports
from gptj8.evaluation.suite import Comparison, Questions, held_out_documents
from gptj8.evaluation.systems import BASELINE, FEW_SHOT, ORIGINAL, QUANTIZED, TUNED
from gptj8.model.loading import load_adapter, load_model, load_original, pick_arithmetic
from gptj8.model.scoring.perplexity import context_length
from gptj8.params.sections import Params
from gptj8.runtime.progress import format_seconds


@dataclass
class Evaluation:
    """An evaluation run: the rows and the systems to measure.

    Attributes:
        params: params of the run.
        comparison: results of all systems.
        train, test: splits of the dataset.
        documents: rows that perplexity is measured on.
        solved: few-shot prompts of the test rows; empty if few-shot is disabled.
    """

    params: Params
    comparison: Comparison
    train: pd.DataFrame
    test: pd.DataFrame
    documents: pd.DataFrame
    solved: list[list[int]]

    @classmethod
    def prepare(cls, params: Params, dataset: PreparedDataset, base: Path) -> Evaluation:
        """Encode all rows and check all inputs.

        Args:
            params: params of the run.
            dataset: the prepared dataset.
            base: directory of the converted model, for its tokenizer and context length.

        Raises:
            UserError: naming the invalid param or file.
        """
        settings, labels = params.evaluate, dataset.labels
        train, test = dataset.split("train"), dataset.split("test")
        prompts, full_context = _prompt_encoders(params, dataset, base)
        conversations = dataset.conversation_encoder(prompts.encoder, prompts.max_length)
        rows, documents = held_out_documents(
            dataset.task,
            test,
            prompts,
            path=settings.perplexity_text,
            text_column=params.data.text_column,
            limit=settings.max_perplexity_documents,
            conversations=conversations,
        )
        questions = Questions.of_rows(
            dataset.task,
            test,
            labels,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            max_generated_rows=settings.max_generated_rows,
            conversations=conversations,
        )
        comparison = Comparison(documents, questions, settings.per_device_eval_batch_size)
        if settings.predictions is not None:
            comparison.predictions.update(read_predictions(settings.predictions, test, labels))
        solved: list[list[int]] = []
        if labels and settings.few_shot:
            shots, seed = settings.few_shot, params.seed
            solved = few_shot_prompts(
                test["text"], train, labels, full_context, count=shots, seed=seed
            )
        return cls(params, comparison, train, test, rows, solved)

    def __str__(self) -> str:
        labels = self.comparison.questions.labels
        label_count = f", {len(labels)} labels" if labels else ""
        return (
            f"{self.params.model.path}, its 8-bit copy and the tuned model, "
            f"{len(self.test):,} test rows{label_count}"
        )

    def measure_baseline(self) -> Iterator[str]:
        """Measure the TF-IDF baseline and yield a line of results, if the task has labels."""
        if not self.comparison.questions.labels:
            return
        with self.comparison.costing(BASELINE):
            train, test = self.train, self.test
            predicted, sure = predict_with_tfidf(train["text"], train["label"], test["text"])
            self.comparison.predictions[BASELINE] = predicted
            self.comparison.confidences[BASELINE] = sure.tolist()
        yield self._result(BASELINE)

    def measure_models(self, base: Path, adapter: Path) -> Iterator[str]:
        """Measure the models one after another and yield a line of results for each."""
        comparison, original = self.comparison, self.params.model.path
        device, dtype = pick_arithmetic(self.params.model.dtype)
        with comparison.costing(ORIGINAL):
            model = load_original(original, base, dtype, device)
            comparison.measure(ORIGINAL, model)
            comparison.remember(ORIGINAL, model)
            del model  # frees it before the next model is loaded
        yield self._result(ORIGINAL)
        with comparison.costing(QUANTIZED):
            model = load_model(base, dtype, device)
            comparison.measure(QUANTIZED, model)
            comparison.compare(QUANTIZED, model)
        yield self._result(QUANTIZED)
        if self.solved:
            with comparison.costing(FEW_SHOT):
                comparison.ask(FEW_SHOT, model, self.solved)
            yield self._result(FEW_SHOT)
        with comparison.costing(TUNED):
            comparison.measure(TUNED, load_adapter(model, adapter))
        yield self._result(TUNED)

    def report(self, folder: Path, started: float) -> dict[str, float]:
        """Write tables and plots, and return all metrics.

        Args:
            folder: directory of the report.
            started: value of `time.perf_counter` at the start of the stage.
        """
        comparison, questions = self.comparison, self.comparison.questions
        resamples, seed = self.params.evaluate.bootstrap_resamples, self.params.seed
        metrics = comparison.metrics(resamples, seed)
        write_reports(
            folder,
            self.test,
            self.documents,
            questions.labels,
            comparison.predictions,
            comparison.scores,
            comparison.generated,
            comparison.confidences,
        )
        write_classification_reports(
            folder,
            questions.labels,
            questions.answers,
            comparison.predictions,
            comparison.likelihoods,
            resamples=resamples,
            seed=seed,
        )
        peaks = (value for key, value in metrics.items() if key.endswith("/peak_memory_gib"))
        metrics["peak_memory_gib"] = max(peaks)
        metrics["seconds"] = time.perf_counter() - started
        return metrics

    def _result(self, system: str) -> str:
        """Return a line with the results of one system."""
        comparison, parts = self.comparison, []
        if system in comparison.scores:
            parts.append(f"perplexity {comparison.scores[system].perplexity:.3f}")
        if system in comparison.predictions:
            is_right = comparison.predictions[system] == list(comparison.questions.answers)
            parts.append(f"accuracy {is_right.mean():.1%}")
        elif system in comparison.generated:
            parts.append(f"{len(comparison.generated[system]):,} answers")
        took = format_seconds(comparison.costs[f"{system}/seconds"])
        name = "baseline (TF-IDF)" if system == BASELINE else system
        return f"{name}: {', '.join(parts)}; {took}"


def _prompt_encoders(
    params: Params, dataset: PreparedDataset, base: Path
) -> tuple[PromptEncoder, PromptEncoder]:
    """Return a prompt encoder with the training length, and one with the full context length."""
    from transformers import AutoConfig

    context = context_length(AutoConfig.from_pretrained(str(base)))
    encoder = TextEncoder.load(base)
    trained = dataset.prompt_encoder(encoder, min(params.data.max_length, context))
    return trained, dataset.prompt_encoder(encoder, context)
