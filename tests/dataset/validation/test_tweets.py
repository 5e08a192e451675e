"""Test of a typical tweet CSV: it needs only params, and the report describes it correctly."""

from __future__ import annotations

import csv
import html
import json
import random
import re
from pathlib import Path

import pytest

from gptj8.dataset.prepared.dataset import load_prepared
from tests.helpers.validate_project import make_project, run_stage, write_params

LABELS = ("negative", "neutral", "positive")
SHARES = (0.62, 0.33, 0.05)
SYLLABLES = "ba ce di fo gu la me ni po ru sha the tra win zo".split()

Tweets = tuple[list[tuple[str, str]], dict[str, set[int]]]


@pytest.fixture(scope="module")
def tweets() -> Tweets:
    """Return 1,000 rows of label and text, and the row numbers (from 1) of each special kind."""
    rng = random.Random(20)
    rows: list[tuple[str, str]] = []
    planted: dict[str, set[int]] = {"html": set(), "lines": set(), "retweet": set(), "copy": set()}
    while len(rows) < 1000:
        number = len(rows) + 1
        kind = rng.random()
        if number > 100 and kind < 0.04:  # a retweet: another prefix, link and case
            label, text = rows[rng.randrange(80)]
            text = re.sub(r" https?://\S+", "", text)
            rows.append(
                (label, f"RT @{rng.choice(SYLLABLES)}{number}: {text} https://t.co/{number}")
            )
            planted["retweet"].add(number)
        elif number > 100 and kind < 0.05:
            rows.append(rows[number - 90])
            planted["copy"].add(number)
            continue
        else:
            words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(16)]
            text = f"{' '.join(words).capitalize()}! #{rng.choice(SYLLABLES)}"
            if kind > 0.93:
                text = text.replace(" ", " &amp; ", 1)
            elif kind > 0.86:
                text = text.replace(" ", ' "quoted",\n\n', 1)
            rows.append((rng.choices(LABELS, SHARES)[0], text))
        text = rows[-1][1]
        planted["html"] |= {number} if "&amp;" in text else set()
        planted["lines"] |= {number} if "\n" in text else set()
    # A copy of a retweet is also a retweet, but is dropped as a copy.
    planted["retweet"] -= planted["copy"]
    return rows, planted


def words_of(page: str) -> str:
    return " ".join(
        html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S)).split()
    )


def test_tweets_need_only_params(tmp_path: Path, tweets: Tweets) -> None:
    rows, planted = tweets
    project = make_project(tmp_path)
    with open(project / "tweets.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("label", "text"), *rows])
    write_params(project, train="tweets.csv", max_length=280)
    done = run_stage(project)
    assert done.returncode == 0, done.stderr

    dataset = load_prepared(project / "artifacts" / "dataset")
    assert dataset.labels == LABELS
    kept = {
        row.row: (row.label, row.text)
        for s in dataset.rows
        for row in dataset.split(s).itertuples()
    }
    assert kept == {n: row for n, row in enumerate(rows, 1) if n not in planted["copy"]}
    assert all("\n\n" in kept[number][1] for number in planted["lines"] - planted["copy"])

    numbers = json.loads((project / "reports" / "validate" / "metrics.json").read_text())
    assert numbers["rows"] == 1000
    assert numbers["duplicate_rows"] == len(planted["copy"]) > 3
    assert numbers["near_duplicate_rows"] == len(planted["retweet"]) > 20
    assert numbers["suspect_rows"] == len(planted["html"]) > 40
    # Near-duplicates are held out together: each retweet is in the split of its original.
    split_of = {row.row: s for s in dataset.rows for row in dataset.split(s).itertuples()}
    bare = {n: re.sub(r"RT @\w+:|https?://\S+", "", rows[n - 1][1]).strip() for n in kept}
    first: dict[str, int] = {}
    for number, text in sorted(bare.items()):
        assert split_of[number] == split_of[first.setdefault(text, number)]

    page = (project / "reports" / "validate" / "report.html").read_text()
    words = words_of(page)
    assert "classification · 1,000 rows read from 1 file" in words
    assert f"texts with HTML entities {len(planted['html'])} rows, kept" in words
    assert "html.unescape converts them to characters" in words
    assert f"near-duplicates within a split {len(planted['retweet'])} rows, kept" in words
    assert f"duplicates within a split {len(planted['copy'])} rows" in words
    assert "Labels are imbalanced" in words and "use macro_f1" in words
    assert re.search(r"is nearly the same as tweets\.csv row \d+ \(similarity 1\.00\)", words)
