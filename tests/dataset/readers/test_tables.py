"""Tables in text files: what separates cells, what quotes mean, and whether there is a header."""

from __future__ import annotations

import csv
import io
import random
from dataclasses import replace

import pytest

from gptj8.dataset.readers.formats import (
    describe_files,
    read_rows,
    require_optional_columns,
    with_format_of,
)
from gptj8.dataset.readers.options import ReadOptions
from gptj8.runtime.errors import UserError
from tests.helpers.labelled_rows import pairs

BOTH = ReadOptions({"text": "text", "label": "label"})
QUOTED = ['he said "no" to me', '"quoted as a whole"', '"begins" so', 'ends "so"', "a, b; c | d"]


def written(rows, delimiter, quoting=csv.QUOTE_MINIMAL, end="\n", header=("text", "label")):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([header, *rows] if header else rows)
    return stream.getvalue()


def cells(path, options=BOTH):
    rows = read_rows(path, options)
    assert rows["problem"].isna().all() and rows["warning"].isna().all()
    return rows[["text", "label"]].to_numpy().tolist()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt"])
def test_what_a_csv_library_writes_is_read(tmp_path, suffix, delimiter, quoting, end):
    rows = [[text, "a"] for text in QUOTED] + [["two\nlines", "b"], ["", "b"], [" x ", "c"]]
    path = tmp_path / f"t.{suffix}"
    path.write_text(written(rows, delimiter, quoting, end), newline="")
    if quoting == csv.QUOTE_MINIMAL and end == "\r":
        rows[5][0] = "two lines"  # not quoted by the library, which expects "\r\n"
        path.write_text(written(rows, delimiter, quoting, end), newline="")
    assert cells(path) == rows


@pytest.mark.parametrize("suffix", ["tsv", "txt"])
def test_quotes_of_a_table_with_tabs_are_text(tmp_path, suffix):
    rows = [[text, "a"] for text in QUOTED] + [['an open " quote', "b"], ['"another', "b"]]
    path = tmp_path / f"t.{suffix}"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    assert cells(path) == rows
    with pytest.raises(UserError, match="line 4 column 9: text follows a closing quote"):
        read_rows(path, replace(BOTH, quoting="minimal"))


def test_a_whole_cell_in_quotes_is_text_unless_all_are(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('text\tlabel\n"a b"\tx\nc\ty\n')
    assert cells(path) == [['"a b"', "x"], ["c", "y"]]
    note = f"{path} has quotes that are part of it (data.quoting)"
    assert describe_files([path], BOTH) == [note]
    path.write_text('"text"\t"label"\n"a b"\t"x"\n')
    assert cells(path) == [["a b", "x"]]
    note = f"{path} has quotes around cells, which were removed (data.quoting)"
    assert describe_files([path], BOTH) == [note]


def test_quoting_is_a_param(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"a" b,x\n')
    with pytest.raises(UserError, match=r"if quotes are part of the text, set data.quoting: none"):
        read_rows(path, BOTH)
    assert cells(path, replace(BOTH, quoting="none")) == [['"a" b', "x"]]


def test_delimiters_are_found_and_said(tmp_path):
    rows = [["a, b", "x"], ["c", "y"]]
    path = tmp_path / "t.csv"
    path.write_text(written(rows, ";"))
    assert cells(path) == rows
    (note,) = describe_files([path], BOTH)
    assert note == f"{path} has cells that are separated by semicolons"
    path.write_text("text%label\na;b%x\n")
    with pytest.raises(
        UserError, match=r"if its cells are not separated by commas, set data.delim"
    ):
        read_rows(path, BOTH)
    assert cells(path, replace(BOTH, delimiter="%")) == [["a;b", "x"]]


def test_a_comma_in_the_only_column_separates_nothing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text\na;b\nc\n")
    assert read_rows(path, ReadOptions({"text": "text"}))["text"].tolist() == ["a;b", "c"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("label_first", [True, False])
def test_a_first_line_that_is_a_row_is_recognized(tmp_path, delimiter, label_first):
    rows = pairs(40, ("yes", "no"))
    order = [row[::-1] for row in rows] if label_first else rows
    path = tmp_path / "t.csv"
    path.write_text(written(order, delimiter, header=None))
    assert cells(path) == rows
    note = describe_files([path], BOTH)[-1]
    assert f"column {2 if label_first else 1} was read as text" in note


def test_of_several_columns_the_one_with_the_fewest_values_is_the_label(tmp_path):
    rng = random.Random(0)
    rows = [
        [f"g{rng.randint(1, 9)}", label, "*" if label == "0" else "", text]
        for text, label in pairs(60, ("0", "1"))
    ]
    path = tmp_path / "in_domain_train.tsv"
    path.write_text(written(rows, "\t", header=None))
    assert cells(path) == [[row[3], row[1]] for row in rows]


@pytest.mark.parametrize(
    "rows",
    [
        [["a b c d e", "x"], ["f g h i j", "y"]],  # no label twice
        [["a", "x"], ["b", "y"]] * 20,  # two columns that may be the label
        [[f"a b {number}", "x"] for number in range(18)],  # one label
    ],
)
def test_what_may_be_a_header_is_not_guessed(tmp_path, rows):
    path = tmp_path / "t.csv"
    path.write_text(written(rows, ",", header=None))
    with pytest.raises(UserError, match="has no column text"):
        read_rows(path, BOTH)
    named = replace(BOTH, column_names=("text", "label"))
    assert cells(path, named) == rows


def test_names_of_columns_are_given_where_there_is_no_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1;Win a prize, now;spam\n2;See you;ham\n")
    options = ReadOptions(
        {"text": "body", "label": "kind"}, column_names=("number", "body", "kind")
    )
    assert cells(path, options) == [["Win a prize, now", "spam"], ["See you", "ham"]]
    with pytest.raises(UserError, match=r"its first line looks like a row: name the columns in"):
        read_rows(path, BOTH)


def test_a_record_without_a_header_says_how_many_names_there_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,x\nb,y\nc,d,e\n")
    rows = read_rows(path, replace(BOTH, column_names=("text", "label")))
    assert rows["problem"].dropna().tolist() == [
        "has 3 cells on line 3, but there are names for 2; quote cells that contain the separator"
    ]


def test_encodings_are_a_param(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(written([["天氣很好", "好"], ["下雨了", "壞"]], ",").encode("big5"))
    assert cells(path, replace(BOTH, encoding="big5")) == [["天氣很好", "好"], ["下雨了", "壞"]]
    path.write_bytes(written([["ä", "x"]], ",").encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16"):
        read_rows(path, BOTH)
    assert cells(path, replace(BOTH, encoding="utf-16")) == [["ä", "x"]]


@pytest.mark.parametrize("name", ["t.tsv", "t.txt"])
def test_a_carriage_return_inside_a_row_is_part_of_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"text\tlabel\na\rb\tx\r\nc\ty\r\n")
    assert cells(path) == [["a\rb", "x"], ["c", "y"]]


def test_a_carriage_return_inside_a_row_of_csv_is_refused_or_quoted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"text,label\na\rb,x\nc,y\n")
    with pytest.raises(UserError, match="line 2: a cell contains a carriage return; put the cell"):
        read_rows(path, BOTH)
    path.write_bytes(b'text,label\n"a\rb",x\nc,y\n')
    assert cells(path) == [["a\rb", "x"], ["c", "y"]]


def test_lines_of_fasttext(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("__label__spam Win a prize\n\n__label__ham See you __label__ soon\n")
    assert cells(path) == [["Win a prize", "spam"], ["See you __label__ soon", "ham"]]
    path.write_text("__label__a b\n__label__a __label__b c\n__label__c d\n")
    rows = read_rows(path, BOTH)
    assert rows["problem"].tolist()[1] == "has 2 labels (__label__NAME); one is needed"
    assert rows["text"].tolist()[::2] == ["b", "d"]


def test_a_table_without_a_suffix(tmp_path):
    path = tmp_path / "Collection"
    path.write_text("".join(f"{label}\t{text}\n" for text, label in pairs(30, ("ham", "spam"))))
    assert cells(path) == pairs(30, ("ham", "spam"))


def test_words_with_tags_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("Ana NNP B-PER\nlaughs VBZ O\n\nBo NNP B-PER\n\n")
    with pytest.raises(UserError, match="it looks like CoNLL's format"):
        read_rows(path, BOTH)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_column_in_quotes_throughout_is_quoted(tmp_path, delimiter):
    path = tmp_path / "t.txt"
    rows = pairs(20)
    path.write_text(
        "".join(f'"{text}"{delimiter}{label}\n' for text, label in [("text", "label"), *rows])
    )
    assert cells(path) == rows


def test_one_damaged_row_does_not_turn_quoting_off(tmp_path):
    rows = [[f"{text}\nsecond", label] for text, label in pairs(40)]
    path = tmp_path / "t.tsv"
    path.write_text(written(rows, "\t") + '"A" is a letter\tx\n')
    with pytest.raises(UserError, match=r"line 82 column 4: text follows a closing quote"):
        read_rows(path, BOTH)


def test_spaces_before_quotes_are_not_part_of_a_cell(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text, label\n"a, b", "x"\n"c", "y"\n')
    assert cells(path) == [["a, b", "x"], ["c", "y"]]


def test_the_separator_line_of_a_spreadsheet(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("sep=;\r\ntext;label\r\na,b;x\r\nc;y;z\r\n")
    rows = read_rows(path, BOTH)
    assert rows["text"][0] == "a,b" and "has 3 cells on line 4" in rows["problem"][1]


def test_a_small_file_is_read_as_the_first_one(tmp_path):
    rows = pairs(40)
    first, small, headed = (tmp_path / f"{name}.txt" for name in "abc")
    first.write_text("".join(f"{text};{label}\n" for text, label in rows))
    small.write_text("one thing;x\nother thing;y\n")
    headed.write_text("label,text\nx,last\n")
    options = with_format_of(first, BOTH)
    assert cells(first, options) == rows
    assert cells(small, options) == [["one thing", "x"], ["other thing", "y"]]
    assert cells(headed, options) == [["last", "x"]]


def test_an_optional_column_of_a_table_in_plain_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("instruction\tinput\na\tb\n")
    options = ReadOptions({"instruction": "instruction", "input": "input"}, frozenset({"input"}))
    require_optional_columns([path], options, ["input"])
    assert read_rows(path, options)["input"].tolist() == ["b"]


def test_a_label_that_is_called_otherwise_is_not_a_test_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,sentiment\na,b\n")
    with pytest.raises(UserError, match=r"its columns: text, sentiment$"):
        read_rows(path, BOTH)


@pytest.mark.parametrize("encoding", ["cp1251", "gbk", "euc-kr", "cp1256"])
def test_other_scripts_are_not_taken_for_latin_letters(tmp_path, encoding):
    text = {"cp1251": "\u0442\u0443\u0442", "cp1256": "\u0633\u0644\u0627\u0645"}.get(encoding)
    text = text or {"gbk": "\u5929\u6c14\u5f88\u597d", "euc-kr": "\ub0a0\uc528"}[encoding]
    path = tmp_path / "t.csv"
    lines = [f"{text} {n},https://example.org/{n}/page" for n in range(9)]
    path.write_bytes("\n".join(["text,label", *lines]).encode(encoding))
    assert (read_rows(path, BOTH)["text_kind"] == "undecodable").any()
    assert (read_rows(path, replace(BOTH, encoding=encoding))["text_kind"] == "text").all()


def test_a_mark_at_the_beginning_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\na,b\n", encoding="utf-8-sig")
    assert cells(path, replace(BOTH, encoding="UTF8")) == [["a", "b"]]
