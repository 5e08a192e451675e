"""The description of a run on MLflow's page: what changed, what came out, how to repeat it.

The page shows only a few lines before "show more", so the first line tells both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gptj8.tracking.identity import LIBRARIES_TAG
from gptj8.tracking.page import CHANGED_TAG, NOTE_TAG

CHANGED_CODE_TAG = "code.changed"
"""Files other than params.yaml that differ from a run's commit, one per line."""

_OWN_NOTE = "*Written by gptj8. A description without this line is not overwritten.*"
_SHOWN = 4
_OUTCOMES = {
    "accuracy": "Accuracy {:.1%} → {:.1%}",
    "exact_match": "Exact match {:.1%} → {:.1%}",
    "perplexity": "Perplexity {:.3f} → {:.3f}",
}
"""The first metric that a run has, of the base and of the tuned model, and how it is written."""


class Changes(NamedTuple):
    """How a run differs from an earlier one.

    Attributes:
        since: name of the earlier run.
        what: the differences, such as `finetune.r=4`, `code` or `torch 2.13.0 → 2.14.0`.
    """

    since: str
    what: list[str]


def changes_since(earlier: Any, run: Any) -> Changes:
    """Return the differences of two MLflow runs in what makes a run."""
    what = [
        f"{key}={value}"
        for key, value in run.data.params.items()
        if earlier.data.params.get(key) != value
    ]
    before, after = earlier.data.tags, run.data.tags
    for key in after:
        kind = key.removeprefix("digest.")
        # A new path is already shown as a param.
        if kind != key and kind in (*run.data.params, "code") and key in before:
            if before[key] != after[key] and not any(c.startswith(f"{kind}=") for c in what):
                what.append(kind if kind == "code" else f"contents of {kind}")
    then, now = (dict(_pins(tags.get(LIBRARIES_TAG, ""))) for tags in (before, after))
    if then:
        what += [
            f"{name} {then.get(name, 'absent')} → {now[name]}"
            for name in now
            if then.get(name) != now[name]
        ]
    return Changes(earlier.info.run_name or earlier.info.run_id, what)


def run_note(
    measured: Mapping[str, float], tags: Mapping[str, str], changes: Changes | None = None
) -> str | None:
    """Return the description of a run in Markdown, or None to keep the existing one.

    Args:
        measured: `<stage>/<metric>` -> value.
        tags: tags of the run.
        changes: what changed since an earlier run; shown if nothing changed since the commit.
    """
    from gptj8.tracking.summary import measured_rows

    if _OWN_NOTE not in tags.get(NOTE_TAG, _OWN_NOTE):
        return None
    rows = [f"| {' | '.join(row)} |" for row in measured_rows(measured)]
    first = [part for part in (_outcome(measured), _changed(tags, changes)) if part]
    parts = [" · ".join(first)] if first else []
    if rows:
        parts.append("\n".join(["| measured | | 95 % interval |", "|---|---|---|", *rows]))
    if "command" in tags:
        parts.append(f"To reproduce:\n\n```sh\n{tags['command']}\n```")
    return "\n\n".join([*parts, _OWN_NOTE]) if parts else None


def _outcome(measured: Mapping[str, float]) -> str:
    for metric, form in _OUTCOMES.items():
        before, after = (measured.get(f"evaluate/{s}/{metric}") for s in ("base", "tuned"))
        if before is not None and after is not None:
            return f"**{form.format(before, after)}**"
    return ""


def _changed(tags: Mapping[str, str], changes: Changes | None) -> str:
    # Overrides are separated by spaces, which values may contain too.
    params = re.split(r" (?=(?:seed|\w+\.\w+)=)", tags[CHANGED_TAG]) if CHANGED_TAG in tags else []
    own = [_shortened([f"`{change}`" for change in params])] if params else []
    if CHANGED_CODE_TAG in tags:
        own.append(f"code ({_shortened(tags[CHANGED_CODE_TAG].splitlines())})")
    if own:
        return f"Changed: {', '.join(own)}"
    if changes is not None and changes.what:
        return f"Changed since {changes.since}: {_shortened([f'`{c}`' for c in changes.what])}"
    return ""


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _pins(text: str) -> Iterator[tuple[str, str]]:
    for pin in text.split():
        name, _, version = pin.partition("==")
        yield name, version
