"""Stop strings end a text at the same place, however it is divided."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from gptj8.serving.stop_strings import StopStrings

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def cut(text, stops):
    """Return the text before the stop string that ends first, found by looking everywhere."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=10))
@example("xabcx", ["abcd", "b"], [2])
@example("aab", ["ab"], [1, 2])
def test_any_division_shows_the_text_before_the_first_stop_string(text, stops, places):
    places = sorted({0, len(text), *(place for place in places if place < len(text))})
    found, shown = StopStrings(stops), ""
    for begin, end in itertools.pairwise(places):
        shown += found.put(text[begin:end])
        assert cut(text, stops).startswith(shown)  # no part of a stop string was shown
    shown += found.end()
    assert shown == cut(text, stops)
    assert found.is_found == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    found = StopStrings(["\n\n", "User:"])
    assert found.put("a\n") == "a"
    assert found.put("b Us") == "\nb "
    assert found.put("ed") == "Used"
    assert found.put("\n") == ""
    assert found.put("\nc") == ""
    assert found.is_found
    assert (found.put("more"), found.end()) == ("", "")
