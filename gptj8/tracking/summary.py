"""What a run has reached, as a short table for the terminal.

Short: what the run was for, what the 8 bits cost, and what it took. All other numbers are in the
reports, which its last lines name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gptj8.evaluation.systems import OWN_SYSTEMS

_NEXT = (
    ("adapter", "artifacts/export, whose README.md is its model card"),
    ("reports", "reports/validate/report.html and reports/evaluate"),
    ("all runs", "make ui, or dvc exp show"),
)


def summary_lines(measured: Mapping[str, float]) -> list[str]:
    """Return the table, with 95 % intervals where they are known.

    Args:
        measured: `<stage>/<metric>` -> value; what is missing has no line.
    """
    rows = measured_rows(measured)
    width = max((len(name) for name, *_ in rows), default=0)
    lines = [
        f"  {name:<{width}}  {value:>10}{interval and f'   {interval}'}"
        for name, value, interval in rows
    ]
    return [*lines, "", *(f"  {name:<10}{place}" for name, place in _NEXT)]


def measured_rows(measured: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return name, value and, where it is known, the interval of what the table shows."""
    rows = []
    for name, key, form in _rows(measured):
        if key in measured:
            ends = [measured[f"{key}_{e}"] for e in ("low", "high") if f"{key}_{e}" in measured]
            rows.append((name, form.format(measured[key]), " to ".join(map(form.format, ends))))
    return rows


def _rows(measured: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    """Yield name, key and format of what may be shown, in its order."""
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
        # Where there are labels, these say nothing new: an exact match is what accuracy is already,
        # and a model that learned to answer has lost its perplexity of running text.
        yield "exact match before: base model", "evaluate/base/exact_match", "{:.1%}"
        yield "exact match after: fine-tuned", "evaluate/tuned/exact_match", "{:.1%}"
        yield "perplexity before: base model", "evaluate/base/perplexity", "{:.3f}"
        yield "perplexity after: fine-tuned", "evaluate/tuned/perplexity", "{:.3f}"
    yield "perplexity, 8-bit / base", "evaluate/quantized/perplexity_ratio", "{:.5f}"
    yield "peak memory of training, GiB", "finetune/peak_memory_gib", "{:.2f}"
    yield "  as estimated before", "finetune/estimated_memory_gib", "{:.2f}"
    yield "training tokens a second", "finetune/tokens_per_second", "{:,.0f}"
    yield "export against trained model, logits", "export/max_logit_difference", "{:.2g}"
    compared = measured.get("export/compared_prompts", 0)
    yield f"  prompts answered alike, of {compared:.0f}", "export/identical_generations", "{:.0f}"
