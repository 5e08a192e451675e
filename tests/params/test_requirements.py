"""Parsing of the conditions in `evaluate.require`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptj8.params.requirements import Requirement, parse_requirement


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tuned/accuracy > base/accuracy", ("tuned/accuracy", ">", "base/accuracy")),
        (
            "quantized/perplexity_ratio_high < 1.005",
            ("quantized/perplexity_ratio_high", "<", 1.005),
        ),
        ("tuned/accuracy_low>=0.8", ("tuned/accuracy_low", ">=", 0.8)),
        ("  a<=-1.5e-3 ", ("a", "<=", -0.0015)),
        ("a > .5", ("a", ">", 0.5)),
        ("a > 5.", ("a", ">", 5.0)),
        ("3-gram_a/f1 > +1", ("3-gram_a/f1", ">", 1.0)),
        ("a < 2nd/b", ("a", "<", "2nd/b")),
        ("a < 1e5b", ("a", "<", "1e5b")),
    ],
)
def test_valid_requirements_are_parsed(text, expected):
    requirement = parse_requirement(text)
    assert requirement == Requirement(*expected)
    assert type(requirement.right) is type(expected[2])
    assert parse_requirement(str(requirement)) == requirement


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has no comparison; write a metric, one of"),
        ("tuned/accuracy", "no comparison"),
        ("a == 1", "no comparison"),
        ("a ≥ 1", "no comparison"),
        ("0.1 < a < 0.5", "more than one comparison"),
        ("a <> 1", "more than one comparison"),
        ("a => 1", "'a =' is not a metric name"),
        ("a =< 1", "'a =' is not a metric name"),
        ("0.5 < a", "starts with a number"),
        ("> 1", "nothing on its left"),
        ("a >", "nothing on its right"),
        ("a > 0,5", "'0,5' is not a metric name"),
        ("a > 50%", "'50%' is not a metric name"),
        ("a > 1_000", "'1_000' is not a metric name"),
        ("a > b + 1", "'b \\+ 1' is not a metric name"),
        ("a/ > 1", "'a/' is not a metric name"),
        ("a//b > 1", "'a//b' is not a metric name"),
        ("a > nan", ": nan cannot be used in a comparison"),
        ("a < -Infinity", ": -Infinity cannot be used in a comparison"),
        ("a < 1e999", "too large"),
        ("a > ١", "is not a metric name"),  # noqa: RUF001
    ],
)
def test_invalid_requirements_raise(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_requirement(text)
    assert "\n" not in str(caught.value)


def test_parsing_loads_no_other_package():
    script = (
        "import sys; import gptj8; before = set(sys.modules)\n"
        "import gptj8.params.requirements\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - sys.stdlib_module_names - {'gptj8'}))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr
