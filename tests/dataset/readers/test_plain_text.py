"""Plain text: documents, paragraphs and passages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptj8.dataset.readers.formats import read_batches, read_rows
from gptj8.dataset.readers.options import END_OF_TEXT, ReadOptions
from gptj8.dataset.readers.plain_text import PASSAGE, choose_text_row
from tests.helpers.labelled_rows import sentences
from tests.helpers.time_limit import time_limit

TEXT = ReadOptions({"text": "text"})
PARAGRAPHS = replace(TEXT, text_row="paragraph")
FILE = replace(TEXT, text_row="file")

PLAY = "Ann:\nOne.\nTwo.\n\nBo:\nOne.\n\n\nAnn:\n  Three.\n"


def write(tmp_path, text):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    return path


def test_paragraphs_continue_each_other(tmp_path):
    rows = read_rows(write(tmp_path, PLAY), PARAGRAPHS)
    assert rows["text"].tolist() == ["Ann:\nOne.\nTwo.\n\n", "Bo:\nOne.\n\n\n", "Ann:\n  Three.\n"]
    assert rows["row"].tolist() == [1, 5, 9]
    assert rows["next_row"].tolist() == [5, 9, 0]
    assert rows["continues"].tolist() == [False, True, True]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize("options", [PARAGRAPHS, FILE], ids=["paragraph", "file"])
def test_no_character_of_a_book_is_lost(tmp_path, options, end):
    lines = sentences(3000)
    for number in range(0, 3000, 7):
        lines[number] = ""
    book = "\n".join(["\ufeffTitle", "", *lines, "The end."]) + "\n"
    rows = read_rows(write(tmp_path, book.replace("\n", end)), options)
    text = book.removeprefix("\ufeff")
    assert "".join(rows["text"]) == text
    assert rows["continues"].tolist() == [False] + [True] * (len(rows) - 1)
    assert rows["next_row"].tolist() == [*rows["row"].tolist()[1:], 0]


def test_a_long_document_is_read_in_passages_of_whole_paragraphs(tmp_path):
    paragraphs = [f"{text}\n{text[::-1]}\n\n" for text in sentences(5000)]
    path = write(tmp_path, "".join(paragraphs))
    found = read_rows(path, FILE)["text"].tolist()
    assert len(found) >= 90
    assert all(PASSAGE <= len(text) < PASSAGE + 500 for text in found[:-1]) or len(found) > 99
    assert all(text.endswith("\n\n") for text in found)
    short = write(tmp_path, "one\r\n\ntwo\n")
    assert read_rows(short, FILE)["text"].tolist() == ["one\n\ntwo\n"]


def test_a_paragraph_without_end_is_divided_at_lines(tmp_path):
    path = write(tmp_path, "".join(f"{text}\n" for text in sentences(20_000)))
    rows = read_rows(path, FILE)
    assert len(rows) > 20 and rows["text"].str.endswith("\n").all()
    assert rows["text"].str.len().max() < 10 * PASSAGE


@pytest.mark.parametrize("options", [TEXT, PARAGRAPHS, FILE], ids=["line", "paragraph", "file"])
def test_an_end_of_text_token_is_a_border(tmp_path, options):
    text = f"a {END_OF_TEXT}\nb{END_OF_TEXT} c\n{END_OF_TEXT}\n\n d\n"
    rows = read_rows(write(tmp_path, text), options)
    assert [text.strip("\n") for text in rows["text"]] == ["a", "b", "c", " d"]
    assert not rows["continues"].any() and not rows["next_row"].any()
    assert rows["row"].tolist() == [1, 2, 2, 5]


def test_the_model_has_its_own_end_of_text_token(tmp_path):
    path = write(tmp_path, "a</s>b\n")
    assert read_rows(path, FILE)["text"].tolist() == ["a</s>b\n"]
    options = replace(FILE, borders=(END_OF_TEXT, "</s>"))
    assert read_rows(path, options)["text"].tolist() == ["a", "b\n"]


@pytest.mark.parametrize(
    ("content", "chosen"),
    [
        (PLAY, "file"),
        (PLAY.replace("\n", "\r\n"), "file"),
        ("one\ntwo\n", "line"),
        ("\n\none\ntwo\n\n", "line"),
        (f"one\n{END_OF_TEXT}\ntwo\n", "file"),
        ("", "line"),
    ],
)
def test_what_a_row_is_is_found_in_the_files(tmp_path, content, chosen):
    path = write(tmp_path, content)
    missing = tmp_path / "a.csv"
    text_row, why = choose_text_row([missing, path], (END_OF_TEXT,), "auto")
    assert text_row == chosen and why


def test_small_files_are_read_together(tmp_path):
    files = [tmp_path / f"{number:04}.txt" for number in range(600)]
    for number, text in enumerate(sentences(600)):
        files[number].write_text(text)
    frames = list(read_batches(files, FILE))
    assert [len(frame) for frame in frames] == [600]
    assert frames[0]["text"].tolist() == sentences(600)
    assert frames[0]["file"].tolist() == [file.as_posix() for file in files]


@pytest.mark.parametrize("options", [PARAGRAPHS, FILE], ids=["paragraph", "file"])
def test_long_paragraphs_and_lines_keep_their_borders(tmp_path, options):
    paragraphs = [f"{' '.join(sentences(20)[:n])}." for n in (16, 18, 20)]
    wrapped = [text.replace(" sand ", "\nsand ") for text in paragraphs]
    content = "\n\n".join([*paragraphs, *wrapped]) + "\n"
    rows = read_rows(write(tmp_path, content), options)
    assert "".join(rows["text"]) == content
    if options is PARAGRAPHS:
        assert [text.strip() for text in rows["text"]] == [*paragraphs, *wrapped]
    line = " ".join(sentences(30_000))
    found = read_rows(write(tmp_path, line), options)["text"]
    assert "".join(found) == line and found.str.len().max() <= 1 << 16


def test_a_long_line_takes_no_time_to_judge(tmp_path):
    path = write(tmp_path, "word " * 200_000)
    with time_limit(5):
        assert choose_text_row([path], (END_OF_TEXT,), "auto")[0] == "line"


def test_lines_that_recur_are_not_texts_of_their_own(tmp_path):
    log = "".join(f"{'yes' if n % 3 else text}\n" for n, text in enumerate(sentences(300)))
    assert choose_text_row([write(tmp_path, log)], (END_OF_TEXT,), "auto")[0] == "file"
    csv = tmp_path / "a.jsonl"
    assert choose_text_row([csv], (END_OF_TEXT,), "auto") == ("line", "")
