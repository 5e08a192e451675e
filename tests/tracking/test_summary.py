"""The summary table at the end of a run."""

from gptj8.tracking.summary import summary_lines


def test_summary_shows_accuracy_and_locations():
    measured = {"evaluate/tuned/accuracy": 0.8123, "evaluate/base/accuracy": 1 / 6}
    lines = summary_lines({**measured, "export/compared_prompts": 100})
    assert any("after: fine-tuned" in line and "81.2%" in line for line in lines)
    assert any("before: base model" in line and "16.7%" in line for line in lines)
    for place in ("artifacts/export", "reports/evaluate", "make ui", "dvc exp show"):
        assert any(place in line for line in lines)
    # After a failed gate there is no export.
    assert not any("artifacts/export" in line for line in summary_lines(measured))


def test_summary_shows_intervals_and_external_systems():
    lines = summary_lines(
        {
            "evaluate/gpt/accuracy": 0.5,
            "evaluate/gpt/accuracy_low": 0.45,
            "evaluate/gpt/accuracy_high": 0.55,
            "evaluate/tuned/accuracy": 0.8,
            "evaluate/tuned/accuracy_minus_gpt": 0.3,
            "export/compared_prompts": 100,
            "export/identical_generations": 99,
        }
    )
    assert any("accuracy, gpt" in line and "45.0% to 55.0%" in line for line in lines)
    assert any("identical answers, of 100 prompts" in line and " 99" in line for line in lines)
    assert len([line for line in lines if "accuracy" in line]) == 2


def test_summary_shows_perplexity_only_without_labels():
    measured = {"evaluate/base/perplexity": 40.0, "evaluate/tuned/perplexity": 20.0}
    assert len([line for line in summary_lines(measured) if "perplexity" in line]) == 2
    labelled = {**measured, "evaluate/tuned/accuracy": 0.9}
    assert not [line for line in summary_lines(labelled) if "perplexity" in line]


def test_summary_shows_estimate_below_peak_memory():
    lines = summary_lines({"finetune/peak_memory_gib": 2.704, "finetune/estimated_memory_gib": 2.9})
    place = next(n for n, line in enumerate(lines) if "peak memory" in line)
    assert "2.70" in lines[place] and "2.90" in lines[place + 1]
