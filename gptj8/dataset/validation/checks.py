"""The checks of `validate`: their kinds, headings and advice."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What happens to a row with a finding."""

    INVALID = "invalid"
    """The row cannot be used; `data.on_invalid` decides what happens."""
    RELATION = "relation"
    """The row is related to another row; the policy for the relation keeps or drops it."""
    SUSPECT = "suspect"
    """The row is used, but should be reviewed."""
    FATAL = "fatal"
    """The dataset cannot be used until this is fixed."""


class Check(NamedTuple):
    """A check: its kind, its heading in the report and advice for fixing its findings."""

    kind: Kind
    heading: str
    advice: str


CHECKS = {
    "malformed": Check(
        Kind.INVALID,
        "malformed rows",
        "The file is truncated or lacks quotes; write it with a CSV or JSON library.",
    ),
    "missing": Check(Kind.INVALID, "missing cells", "Fill them or remove the rows."),
    "type": Check(
        Kind.INVALID, "cells of the wrong type", "Texts must be strings, not numbers or lists."
    ),
    "empty": Check(Kind.INVALID, "empty texts", "Fill them or remove the rows."),
    "undecodable": Check(
        Kind.INVALID,
        "bytes that are not UTF-8",
        "The file, or a part pasted into it, has another encoding; save it as UTF-8.",
    ),
    "nul": Check(
        Kind.INVALID,
        "texts with a NUL character",
        "The text contains binary data; export the file again.",
    ),
    "replacement": Check(
        Kind.INVALID,
        "texts with U+FFFD, decoded with the wrong encoding",
        "The original characters are lost; export the file again from its source.",
    ),
    "messages": Check(
        Kind.INVALID,
        "invalid conversations",
        "A conversation needs a message from the user and an answer from the assistant; "
        "data.chat_template names another template if this one refuses it.",
    ),
    "unknown_label": Check(
        Kind.INVALID,
        "labels that are not in data.labels",
        "Correct the label, or add it to data.labels.",
    ),
    "room": Check(
        Kind.INVALID,
        "answers that leave no room for the text",
        "Answers are never truncated; raise data.max_length.",
    ),
    "label_case": Check(
        Kind.FATAL,
        "labels that differ only in case, whitespace or Unicode form",
        "The model would learn them as different answers; use one spelling per label.",
    ),
    "unseen_label": Check(
        Kind.FATAL,
        "labels that are missing from train",
        "The model cannot learn a label that it never sees; move some of these rows to train.",
    ),
    "leak": Check(
        Kind.RELATION,
        "texts that also occur in a later split",
        "Leaks inflate metrics; data.on_leak = drop keeps only the copy in the later split.",
    ),
    "near_leak": Check(
        Kind.RELATION,
        "texts with a near-duplicate in a later split",
        "They are handled like exact leaks; data.near_duplicate_threshold sets the similarity.",
    ),
    "duplicate": Check(
        Kind.RELATION,
        "duplicates within a split",
        "Only the first is kept, because copies count twice in training and in metrics.",
    ),
    "near_duplicate": Check(
        Kind.RELATION,
        "near-duplicates within a split",
        "data.on_near_duplicate = drop keeps the first. Near-duplicates are held out together.",
    ),
    "conflict": Check(
        Kind.SUSPECT,
        "texts with different answers",
        "They teach the model to guess; choose one answer, or make the texts different.",
    ),
    "joined": Check(
        Kind.SUSPECT,
        "cells that look like several rows",
        "Put the text in quotes and double each quote inside it. Start with the first such "
        "cell; later ones may be consequences of it.",
    ),
    "mojibake": Check(
        Kind.SUSPECT, "texts that look like mojibake", "ftfy.fix_text repairs most mojibake."
    ),
    "html": Check(
        Kind.SUSPECT,
        "texts with HTML entities",
        "The model learns them literally; html.unescape converts them to characters.",
    ),
    "control": Check(
        Kind.SUSPECT,
        "texts with control characters",
        "Readers cannot see them, but the model learns them as tokens.",
    ),
    "special_token": Check(
        Kind.SUSPECT,
        "texts with the name of a special token",
        "It is encoded as plain text, without a special effect. If it was added as a "
        "separator or end marker, remove it.",
    ),
    "placeholder": Check(
        Kind.SUSPECT,
        "texts with a placeholder for an image, a sound or a video",
        "The model gets the placeholder as text and not what it stands for.",
    ),
    "unread_fields": Check(
        Kind.SUSPECT,
        "messages with fields that the chat template does not read",
        "They do not reach the model; use a chat template that reads them, or put them into the "
        "content.",
    ),
    "unanswered": Check(
        Kind.SUSPECT,
        "conversations that do not begin with a question and end with an answer",
        "An answer before the first question is not learned, and what follows the last answer is "
        "not used.",
    ),
    "seam": Check(
        Kind.SUSPECT,
        "prompts whose last token continues in the answer",
        "A prompt alone has other tokens at its end, so the model is asked differently than it was "
        "trained. Move the white space between them to the other side.",
    ),
    "truncated": Check(
        Kind.SUSPECT,
        "texts longer than max_length",
        "The text is truncated, the answer is not; raise data.max_length to keep all of the text.",
    ),
}
