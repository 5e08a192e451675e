"""A short table of a run's results for the terminal.

It shows the purpose of the run, the cost of 8 bits and the resources used. All other numbers are in
the reports, which the last lines name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gptj8.evaluation.systems import OWN_SYSTEMS
from gptj8.runtime.project import EXPORT, REPORTS
from gptj8.runtime.tables import format_table

_NEXT = (
    ("adapter", f"{EXPORT}, whose README.md is its model card"),
    ("reports", f"{REPORTS}/validate/report.html and {REPORTS}/evaluate"),
    ("all runs", "make ui, or dvc exp show"),
)


def summary_lines(measured: Mapping[str, float]) -> list[str]:
    """Return the table, with 95 % confidence intervals where they are known.

    Args:
        measured: `<stage>/<metric>` -> value; missing metrics have no line.
    """
    results = format_table(measured_rows(measured), align="lrl")
    is_exported = any(key.startswith("export/") for key in measured)
    shown = [line for line in _NEXT if is_exported or line[0] != "adapter"]
    table = [*results, "", *format_table(shown, align="l")]
    return [f"  {line}".rstrip() for line in table]


def measured_rows(measured: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return name, value and confidence interval (empty if unknown) of each row of the table."""
    rows = []
    for name, key, form in _rows(measured):
        if key in measured:
            ends = [measured[f"{key}_{e}"] for e in ("low", "high") if f"{key}_{e}" in measured]
            rows.append((name, form.format(measured[key]), " to ".join(map(form.format, ends))))
    return rows


def _rows(measured: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    """Yield name, key and format of all possible rows, in order."""
    yield "accuracy before: base model", "evaluate/base/accuracy", "{:.1%}"
    yield "accuracy, few-shot", "evaluate/few_shot/accuracy", "{:.1%}"
    yield "accuracy, TF-IDF + logistic regression", "evaluate/baseline/accuracy", "{:.1%}"
    for key in measured:
        stage, *system, metric = key.split("/")
        if stage == "evaluate" and metric == "accuracy" and len(system) == 1:
            if system[0] not in OWN_SYSTEMS:
                yield f"accuracy, {system[0]}", key, "{:.1%}"
    yield "accuracy after: fine-tuned", "evaluate/tuned/accuracy", "{:.1%}"
    if "evaluate/tuned/accuracy" not in measured:
        # With labels these are not informative: exact match equals accuracy, and the perplexity of
        # running text degrades in a model that learned to answer with labels.
        yield "exact match before: base model", "evaluate/base/exact_match", "{:.1%}"
        yield "exact match after: fine-tuned", "evaluate/tuned/exact_match", "{:.1%}"
        yield "perplexity before: base model", "evaluate/base/perplexity", "{:.3f}"
        yield "perplexity after: fine-tuned", "evaluate/tuned/perplexity", "{:.3f}"
    yield "perplexity, 8-bit / base", "evaluate/quantized/perplexity_ratio", "{:.5f}"
    yield "KL divergence, 8-bit from base", "evaluate/quantized/kl_divergence", "{:.2g}"
    yield "peak memory of training, GiB", "finetune/peak_memory_gib", "{:.2f}"
    yield "  estimated before training", "finetune/estimated_memory_gib", "{:.2f}"
    yield "training tokens per second", "finetune/tokens_per_second", "{:,.0f}"
    yield "logit difference, export vs. trained", "export/max_logit_difference", "{:.2g}"
    compared = measured.get("export/compared_prompts", 0)
    yield (
        f"  identical answers, of {compared:.0f} prompts",
        "export/identical_generations",
        "{:.0f}",
    )
