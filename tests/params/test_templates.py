"""What belongs to a field of a prompt template, in every position."""

from __future__ import annotations

import pytest

from gptj8.params.sections import Data
from gptj8.params.templates import parse_template

ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
SYSTEM = "System: {system}\n\nUser: {instruction}\n\nAssistant:"
HEADED = "Below is a task.\n\n### System:\n{system}\n\n### Task:\n{task}\n\n### Answer:\n"

CASES = [
    (ALPACA, "input", ALPACA.replace("\n\n### Input:\n{input}", "")),
    (SYSTEM, "system", SYSTEM.replace("System: {system}\n\n", "")),
    (HEADED, "system", HEADED.replace("### System:\n{system}\n\n", "")),
    ("Title: {title}\nText: {text}\n\nLabel:", "title", "Text: {text}\n\nLabel:"),
    ("Text: {text}\nTopic: {topic}\n\nLabel:", "topic", "Text: {text}\n\nLabel:"),
    ("{text} [{topic}]\n\nLabel:", "topic", "{text}\n\nLabel:"),
    ("{text} ({topic}) Label:", "topic", "{text} Label:"),
    ('{text} "{topic}" Label:', "topic", "{text} Label:"),
    ("{city}, {country}\nLabel:", "city", "{country}\nLabel:"),
    ("{city}, {country}\nLabel:", "country", "{city}\nLabel:"),
    ("{a}, {b}; {c}\nLabel:", "b", "{a}; {c}\nLabel:"),
    ("Note: {a} (short)\nText: {b}\nLabel:", "a", "Text: {b}\nLabel:"),
    ("An introduction.\n\n{a}\n{b}\n\nLabel:", "a", "An introduction.\n\n{b}\n\nLabel:"),
]


@pytest.mark.parametrize(("template", "optional", "without"), CASES)
def test_an_empty_field_takes_its_own_words_with_it(template, optional, without):
    parsed = parse_template(template, "classification").with_optional({optional})
    cells = {field: f"<{field}>" for field in parsed.fields}
    assert parsed.before + parsed.text(cells) + parsed.after == template.format(**cells)
    for empty in ("", " \n", None):
        found = parsed.before + parsed.text({**cells, optional: empty}) + parsed.after
        assert found == without.format(**cells)


def test_the_words_around_the_row_are_the_same_in_every_prompt():
    """They are never truncated, so they must not depend on the row."""
    parsed = parse_template(HEADED, "completion").with_optional({"system"})
    assert (parsed.before, parsed.after) == ("Below is a task.\n\n", "\n\n### Answer:\n")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"{text}\n\nLabel:", "{text}\n\nLabel:"),
        (r"a\t{text}", "a\t{text}"),
        (r"{text} \\n", r"{text} \n"),
        ("{text}\n\nLabel:", "{text}\n\nLabel:"),
        (r"{text} \alpha", r"{text} \alpha"),
    ],
)
def test_line_breaks_that_a_shell_passed_on_as_two_characters(written, meant):
    assert Data(train="x.csv", prompt_template=written).prompt_template == meant


@pytest.mark.parametrize(
    ("labels", "meant"),
    [([0, 1], ("0", "1")), ([True, "no"], ("true", "no")), ([2.5, 3, 2.0], ("2.5", "3", "2"))],
)
def test_labels_that_yaml_reads_as_numbers(labels, meant):
    assert Data(train="x.csv", labels=tuple(labels)).labels == meant
