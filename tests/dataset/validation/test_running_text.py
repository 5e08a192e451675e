"""Running text reaches the training examples as it is, and whole parts of it are held out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gptj8.dataset.prepared.dataset import SPLITS, load_prepared
from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.readers.options import END_OF_TEXT
from gptj8.dataset.validation.run import validate
from gptj8.dataset.validation.running_text import MANY_DOCUMENTS, Parts, encode_parts
from gptj8.params.sections import Data
from tests.helpers.labelled_rows import sentences
from tests.helpers.tokenizer_families import FAMILIES, write_family


@pytest.fixture(scope="module", params=["gpt2", "llama2", "llama3", "gemma"])
def encoder(request, tmp_path_factory) -> TextEncoder:
    return TextEncoder.load(write_family(request.param, tmp_path_factory.mktemp("t")))


def check(folder: Path, content: str, encoder: TextEncoder, **data):
    (folder / "book.txt").write_text(content)
    out = folder / "out"
    out.mkdir()
    params = {"train": str(folder / "book.txt"), "task": "text", "max_length": 32, **data}
    validated = validate(Data(**params), encoder, out)
    assert not validated.problems, validated.problems
    return validated, load_prepared(out)


def play(lines: int = 400) -> str:
    """Return a text whose speakers and exclamations recur."""
    parts = []
    for number, text in enumerate(sentences(lines)):
        parts.append(f"{'Ann' if number % 2 else 'Bo'}:\n{text}.\nAy!\n")
        if number % 3 == 0:
            parts.append("Exeunt.\n")
    return "\n".join(parts)


def texts_of(prepared, name):
    rows = prepared.split(name)
    return dict(zip(rows["row"], rows["text"], strict=True))


def test_a_book_is_trained_without_a_border_except_where_parts_are_held_out(tmp_path, encoder):
    content = play()
    validated, prepared = check(tmp_path, content, encoder, text_row="paragraph")
    texts = {name: texts_of(prepared, name) for name in SPLITS}
    everything = {row: text for found in texts.values() for row, text in found.items()}
    assert "".join(everything[row] for row in sorted(everything)) == content
    assert validated.findings.dropped_rows == 0 and validated.findings.checks() == []
    # The stream of train: runs of paragraphs, with the ids that they have in the book.
    (book,) = encoder.tokenize([content])
    runs: list[tuple[int, int]] = []
    place = 0
    for row in sorted(everything):
        end = place + len(everything[row])
        if row in texts["train"]:
            is_next = runs and runs[-1][1] == place
            runs.append((runs.pop()[0], end) if is_next else (place, end))
        place = end
    expected: list[int] = []
    for start, end in runs:
        first = book.token_at(start) if start else 0
        last = book.token_at(end) if end < len(content) else len(book.ids)
        expected += [*encoder.prefix_ids, *book.ids[first:last], encoder.eos_id]
    stream = [i for example in prepared.examples("train") for i in example["input_ids"]]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) <= 1
    assert validated.tokens["train"] == len(expected)
    assert 20 < len(runs) < len(texts["test"]) + len(texts["validation"]) + 2


def test_short_parts_may_recur_but_long_ones_are_held_out_together(tmp_path, encoder):
    chorus = " ".join(sentences(12)) + ".\n"
    parts = [f"{text}.\n" for text in sentences(300)[20:]]
    for place in range(0, 280, 40):
        parts[place] = chorus
    validated, prepared = check(tmp_path, "\n".join(parts), encoder, text_row="paragraph")
    assert len(chorus) > 100
    of = {name: [*texts_of(prepared, name).values()].count(f"{chorus}\n") for name in SPLITS}
    assert sorted(of.values()) == [0, 0, 7]
    assert validated.findings.checks() == []


def test_many_documents_are_held_out_whole(tmp_path, encoder):
    documents = ["\n\n".join(sentences(900)[start : start + 30]) for start in range(0, 900, 30)]
    assert len(documents) >= MANY_DOCUMENTS
    content = f"\n{END_OF_TEXT}\n".join(documents)
    _, prepared = check(tmp_path, content, encoder, text_row="auto")
    kept = 0
    for name in SPLITS:
        rows = texts_of(prepared, name)
        text = "".join(rows[row] for row in sorted(rows))
        inside = [document for document in documents if document in text]
        assert len(text.strip()) == len(re.sub(r"\n\Z", "", "\n".join(inside)).strip())
        kept += len(inside)
    assert kept == len(documents)


def test_leaks_between_files_are_of_long_parts(tmp_path, encoder):
    content = play(60)
    other = play(120)[len(content) :]
    (tmp_path / "test.txt").write_text(other)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "book.txt").write_text(content)
    data = Data(
        train=str(tmp_path / "book.txt"), test=str(tmp_path / "test.txt"), task="text",
        text_row="paragraph",
    )  # fmt: skip
    assert validate(data, encoder, out).problems == []
    shared = " ".join(sentences(9)) + "."
    assert len(shared) > 100
    (tmp_path / "test.txt").write_text(f"{other}\n{shared}\n")
    (tmp_path / "book.txt").write_text(f"{content}\n{shared}\n")
    out = tmp_path / "again"
    out.mkdir()
    (problem,) = validate(data, encoder, out).problems
    assert problem.startswith("identical texts are in two splits (1 in train and test)")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_have_the_ids_that_they_have_within_their_text(tmp_path, family):
    encoder = TextEncoder.load(write_family(family, tmp_path))
    parts = [f"{text}.\n{text[::-1]}\n\n" for text in sentences(40)]
    inside = np.ones(40, dtype=bool)
    first, last = inside.copy(), inside.copy()
    first[0] = last[-1] = False
    found = encode_parts(encoder, parts, first, last)
    assert [i for ids in found for i in ids] == encoder.encode("".join(parts))


def test_documents_that_are_copies_are_duplicates_or_held_out_together(tmp_path, encoder):
    documents = [
        "\n\n".join(f"{text} " * 3 for text in sentences(360)[start : start + 6])
        for start in range(0, 360, 6)
    ]
    changed = [f"{document}\n\nfooter {n}" for n, document in enumerate(documents[:20])]
    content = f"\n{END_OF_TEXT}\n".join([*documents, *documents[20:30], *changed])
    validated, prepared = check(tmp_path, content, encoder, text_row="paragraph")
    assert validated.findings.dropped("duplicate") == validated.findings.dropped_rows == 60
    places = {}
    for name in SPLITS:
        for text in texts_of(prepared, name).values():
            places.setdefault(text.strip(), set()).add(name)
    assert all(len(names) == 1 for text, names in places.items() if len(text) >= 100)


def test_borders_are_where_a_neighbor_is_missing():
    follows = np.array([0, 1, 1, 0, 1, 1, 1], dtype=bool)
    kept = np.array([1, 1, 1, 1, 0, 1, 1], dtype=bool)
    split = np.array([0, 0, 1, 0, 0, 0, 0], dtype=np.uint8)
    begins, ends = Parts(follows).borders(kept, split)
    assert begins.tolist() == [True, False, True, True, True, True, False]
    assert ends.tolist() == [False, True, True, True, True, False, True]
    copies = np.array([1, 2, 1, 1, 1, 0, 1])
    begins, ends = Parts(follows).borders(kept, split, copies)
    assert begins.tolist() == [True] * 7 and ends.tolist() == [True] * 7
