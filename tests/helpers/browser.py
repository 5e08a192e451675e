"""A real browser."""

from __future__ import annotations

import os
import shutil

import pytest


def chromium() -> str:
    """Return the path of the browser; fail instead of skipping if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("GPTJ8_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(
            "no Chromium: apt-get install chromium, or name one in GPTJ8_CHROMIUM", pytrace=False
        )
    return found
