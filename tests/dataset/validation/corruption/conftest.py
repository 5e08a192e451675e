"""The tokenizer of these tests: one token per byte and one special token."""

from __future__ import annotations

import pytest

from gptj8.dataset.prepared.text_encoder import TextEncoder
from tests.dataset.validation.corruption.texts import SPECIAL
from tests.helpers.labelled_rows import byte_tokenizer


@pytest.fixture(scope="session")
def encoder() -> TextEncoder:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([SPECIAL])
    return TextEncoder(tokenizer, eos_id=0)
