"""The gate checks requirements against metrics and explains unmet ones."""

from __future__ import annotations

import math

import pytest

from gptj8.evaluation.gate import check_requirements
from gptj8.params.requirements import parse_requirement
from gptj8.runtime.errors import UserError

METRICS = {
    "evaluate": {"tuned/accuracy": 0.31, "base/accuracy": 0.398, "seconds": 5.0, "odd": math.nan},
    "finetune": {"eval_loss": 0.5, "seconds": 70.0},
    "export": {"max_logit_difference": 1e-5},
}


def outcome(text, metrics=METRICS):
    return check_requirements([parse_requirement(text)], metrics)[0]


@pytest.mark.parametrize(
    ("text", "met", "margin"),
    [
        ("tuned/accuracy > base/accuracy", False, -0.088),
        ("tuned/accuracy < base/accuracy", True, 0.088),
        ("tuned/accuracy > 0.31", False, 0),
        ("tuned/accuracy >= 0.31", True, 0),
        ("tuned/accuracy < 0.31", False, 0),
        ("tuned/accuracy <= 0.31", True, 0),
        ("tuned/accuracy >= 0.32", False, -0.01),
        ("tuned/accuracy <= 0.3", False, -0.01),
    ],
)
def test_comparisons_and_margins(text, met, margin):
    found = outcome(text)
    assert found.met is met
    assert found.margin == pytest.approx(margin, abs=1e-12)


@pytest.mark.parametrize("comparison", ["<", "<=", ">", ">="])
def test_nan_never_meets_a_requirement(comparison):
    for text in (f"odd {comparison} 1", f"seconds {comparison} odd", f"odd {comparison} odd"):
        found = outcome(text)
        assert found.met is False
        assert math.isnan(found.margin)
        assert str(found).endswith("cannot be met")


def test_outcome_messages():
    assert str(outcome("tuned/accuracy>base/accuracy")) == (
        "tuned/accuracy > base/accuracy is not met: 0.31 > 0.398 misses by 0.088"
    )
    assert str(outcome("export/max_logit_difference <= 2e-5")) == (
        "export/max_logit_difference <= 2e-05 is met: 1e-05 <= 2e-05 holds by 1e-05"
    )
    assert str(outcome("seconds < 5")) == "seconds < 5 is not met: 5 < 5 misses by 0"


def test_names_are_looked_up_in_evaluate_first():
    assert outcome("seconds < 6").left == 5
    assert outcome("evaluate/seconds < 6").left == 5
    assert outcome("finetune/seconds < 6").left == 70
    assert outcome("evaluate/tuned/accuracy > finetune/eval_loss").margin == pytest.approx(-0.19)
    metrics = {"evaluate": {"finetune/seconds": 1.0}, "finetune": {"seconds": 2.0}}
    assert outcome("finetune/seconds > 0", metrics).left == 1


def test_all_unknown_metrics_are_listed():
    texts = ["tuned/acuracy > 0.1", "seconds < 1", "seconds < fintune/eval_loss", "eval_loss < 1"]
    with pytest.raises(UserError) as caught:
        check_requirements([parse_requirement(text) for text in texts], METRICS)
    lines = str(caught.value).split("\n")
    assert lines[0] == (
        "tuned/acuracy > 0.1: there is no metric tuned/acuracy, did you mean tuned/accuracy?"
    )
    assert lines[1].endswith("no metric fintune/eval_loss, did you mean finetune/eval_loss?")
    assert lines[2].endswith("no metric eval_loss, did you mean finetune/eval_loss?")
    assert len(lines) == 3


def test_unknown_metric_without_a_similar_name():
    with pytest.raises(UserError, match=r"no metric zzz; available: 'base/accuracy', 'eval"):
        outcome("zzz > 1")
    with pytest.raises(UserError, match="no metric zzz; no metrics available"):
        outcome("zzz > 1", {})


def test_outcomes_keep_the_order():
    texts = ["seconds < 1", "finetune/seconds > 1", "seconds < 1"]
    outcomes = check_requirements([parse_requirement(text) for text in texts], METRICS)
    assert [str(found.requirement) for found in outcomes] == texts
    assert [found.met for found in outcomes] == [False, True, False]
    assert check_requirements([], {}) == []
