"""Stop strings: an answer ends before the first of them, and no part of it is shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Pass on the text of one answer until a stop string is complete.

    Text that may be the beginning of a stop string is held back until it is certain. The stop
    string that is completed first counts, and of several that are completed by the same character
    the longest. So the result does not depend on how tokens divide the text.

    Args:
        strings: not empty each.

    Attributes:
        is_found: whether a stop string was completed.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.is_found = False
        self._strings = strings
        self._held = ""

    def put(self, piece: str) -> str:
        """Return the text that can be shown after a piece of text."""
        if self.is_found:
            return ""
        text = self._held + piece
        places = [(place, stop) for stop in self._strings if (place := text.find(stop)) >= 0]
        if places:
            self.is_found = True
            self._held = ""
            return text[: min((place + len(stop), place) for place, stop in places)[1]]
        kept = max((_overlap(text, stop) for stop in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def end(self) -> str:
        """Return the text that was held back, once the answer is complete."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text with which a stop string begins."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
