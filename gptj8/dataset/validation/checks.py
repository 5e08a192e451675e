"""The checks that `validate` makes, by name: what each finds and what follows from it."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What follows from a finding."""

    INVALID = "invalid"
    """The row cannot be used; `data.on_invalid` decides."""
    RELATION = "relation"
    """The row has a relative; it goes or stays as the policy for this relation says."""
    SUSPECT = "suspect"
    """The row is used; a person should look at it."""
    FATAL = "fatal"
    """The dataset cannot be used until this is mended."""


class Check(NamedTuple):
    """One check, its heading in the report, and what a person may do about what it finds."""

    kind: Kind
    heading: str
    advice: str


CHECKS = {
    "malformed": Check(
        Kind.INVALID,
        "rows that cannot be taken apart",
        "The file was cut off or written without quotes; write it with a CSV or JSON library.",
    ),
    "missing": Check(Kind.INVALID, "missing cells", "Fill them or leave the rows out."),
    "type": Check(
        Kind.INVALID, "cells of the wrong type", "A number or a list is no text to learn from."
    ),
    "empty": Check(Kind.INVALID, "empty texts", "Fill them or leave the rows out."),
    "undecodable": Check(
        Kind.INVALID,
        "bytes that are not UTF-8",
        "The file, or the part that was pasted into it, has another encoding; save it as UTF-8.",
    ),
    "nul": Check(
        Kind.INVALID,
        "texts with a NUL character",
        "Binary data came among the text; export it anew.",
    ),
    "replacement": Check(
        Kind.INVALID,
        "texts with U+FFFD, once read with the wrong encoding",
        "The characters are lost in this file; export it anew from its source.",
    ),
    "messages": Check(
        Kind.INVALID,
        "conversations that cannot be learned from",
        "A conversation needs a message of the user and ends with the assistant's.",
    ),
    "unknown_label": Check(
        Kind.INVALID,
        "labels that data.labels does not name",
        "Correct the label, or add it to data.labels.",
    ),
    "room": Check(
        Kind.INVALID,
        "answers that leave no room for their text",
        "Answers are never cut; raise data.max_length.",
    ),
    "label_case": Check(
        Kind.FATAL,
        "labels that differ only in case, spaces or Unicode form",
        "The model would learn them as different answers; spell each label one way.",
    ),
    "unseen_label": Check(
        Kind.FATAL,
        "labels that train never shows",
        "What is never shown cannot be learned; move some of these rows to train.",
    ),
    "leak": Check(
        Kind.RELATION,
        "texts that are in a later split as well",
        "The model is measured on what it has seen; data.on_leak: drop keeps the later copy only.",
    ),
    "near_leak": Check(
        Kind.RELATION,
        "texts that are nearly the same as one in a later split",
        "As with exact leaks; data.near_duplicate_threshold says how alike they have to be.",
    ),
    "duplicate": Check(
        Kind.RELATION,
        "duplicates within a split",
        "The first is kept: copies count double in training and in every measurement.",
    ),
    "near_duplicate": Check(
        Kind.RELATION,
        "near-duplicates within a split",
        "data.on_near_duplicate: drop keeps the first. Rows are held out with their relatives.",
    ),
    "conflict": Check(
        Kind.SUSPECT,
        "texts with different answers",
        "They teach the model to guess; decide for one answer, or tell the texts apart.",
    ),
    "joined": Check(
        Kind.SUSPECT,
        "cells that look like several rows",
        "A quote inside a text is written twice, and the whole text in quotes; mend the first one.",
    ),
    "mojibake": Check(
        Kind.SUSPECT, "texts that look misread", "ftfy.fix_text mends most of them, if it is so."
    ),
    "html": Check(
        Kind.SUSPECT,
        "texts with HTML entities",
        "html.unescape turns them into what readers saw; the model learns them as they stand.",
    ),
    "control": Check(
        Kind.SUSPECT, "texts with control characters", "They are tokens that no reader ever saw."
    ),
    "special_token": Check(
        Kind.SUSPECT,
        "texts with the name of a special token",
        "It is encoded as plain text and ends nothing; remove it if it was meant to.",
    ),
    "truncated": Check(
        Kind.SUSPECT,
        "texts longer than max_length",
        "Their ends are cut, their answers never; raise data.max_length if the ends matter.",
    ),
}
