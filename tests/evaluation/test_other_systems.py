"""Predictions of outside systems: each test row once, as text, and every problem at once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gptj8.evaluation.other_systems import read_predictions
from gptj8.evaluation.systems import OWN_SYSTEMS
from gptj8.runtime.errors import UserError

LABELS = ["1", "NA", "sql"]


@pytest.fixture
def test_rows():
    return pd.DataFrame(
        {
            "file": ["data/a.csv", "data/a.csv", "data/b.csv", "data/b.csv"],
            "row": [1, 3, 1, 7],
            "text": list("abcd"),
            "label": ["1", "NA", "sql", "1"],
        }
    )


@pytest.fixture
def one_file(test_rows):
    return test_rows.assign(file="data/a.csv", row=[1, 3, 5, 7])


@pytest.fixture
def problems(tmp_path, test_rows):
    """Write a file (text or bytes) and return the lines of the error, without the folder."""

    def read(content, name="other.csv", rows=test_rows, labels=LABELS):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as caught:
            read_predictions(path, rows, labels)
        return str(caught.value).replace(f"{tmp_path}/", "").split("\n")

    return read


GOOD = (
    "file,row,prediction\ndata/a.csv,1,1\ndata/a.csv,3,NA\ndata/b.csv,1,sql\ndata/b.csv,7,other\n"
)


def test_in_any_order_and_as_text(tmp_path, test_rows):
    path = tmp_path / "my-System_2.csv"
    path.write_bytes(
        b"\xef\xbb\xbfnote,prediction,row,file\r\n"
        b'"x,\ny",nan,7,data/b.csv\r\n,1, 1 ,data/a.csv\r\n\r\n'
        b',other,1,data/b.csv\r\n," NA\n",03,data/a.csv\r\n'
    )
    predictions = read_predictions(path, test_rows, LABELS)
    assert list(predictions) == ["my-System_2"]
    assert predictions["my-System_2"].tolist() == ["1", "NA", "other", "nan"]
    assert predictions["my-System_2"].dtype == object
    shuffled = test_rows.iloc[[2, 0, 3, 1]]
    again = read_predictions(str(path), shuffled, LABELS)["my-System_2"]
    assert again.tolist() == ["other", "1", "nan", "NA"]


def test_without_file_where_there_is_only_one(tmp_path, one_file, test_rows):
    path = tmp_path / "other.csv"
    path.write_text("row,prediction\n7,a\n5,b\n3,c\n1,1\n")
    assert read_predictions(path, one_file, LABELS)["other"].tolist() == ["1", "c", "b", "a"]
    with pytest.raises(UserError, match=r"other\.csv has no column file$"):
        read_predictions(path, test_rows, LABELS)
    path.write_text("file,row,prediction\n" + "".join(f"b.csv,{row},1\n" for row in (1, 3, 5, 7)))
    with pytest.raises(UserError, match=r"of no test row: 4 \(record 1 has b.csv row 1, "):
        read_predictions(path, one_file, LABELS)


def test_every_csv_of_a_directory(tmp_path, test_rows):
    for name in ("b.csv", "a.csv", "notes.txt"):
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "folder.csv").mkdir()
    predictions = read_predictions(tmp_path, test_rows, LABELS)
    assert list(predictions) == ["a", "b"]
    np.testing.assert_array_equal(predictions["a"], predictions["b"])


def test_all_problems_of_all_files_at_once(tmp_path, test_rows):
    (tmp_path / "one.csv").write_text(GOOD.replace("data/a.csv,3,NA\n", ""))
    (tmp_path / "tuned.csv").write_text(GOOD)
    (tmp_path / "two.csv").write_text("")
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "my system.csv").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        read_predictions(tmp_path, test_rows, LABELS)
    assert str(caught.value).replace(f"{tmp_path}/", "").split("\n") == [
        "my system.csv: a system's name has only letters, digits, _ and -; rename the file",
        "one.csv: test rows without a prediction: 1 (data/a.csv row 3)",
        "tuned.csv: tuned is the name of a system measured here; rename the file",
        "two.csv is empty",
    ]


def test_all_problems_of_a_file_at_once(problems):
    content = GOOD.encode() + (
        b"data/a.csv,1,1\ndata/a.csv,1,NA\ndata/a.csv,2,1\ndata/c.csv,1,1\n"
        b"data/a.csv,3.0,1\ndata/a.csv,,1\ndata/b.csv,7\ndata/b.csv,7,\xff\n"
    )
    content = content.replace(b"data/b.csv,1,sql\n", b"")
    assert problems(content) == [
        "other.csv: records of no test row: 2 "
        "(record 6 has data/a.csv row 2, record 7 has data/c.csv row 1)",
        "other.csv: records whose row is no whole number: 2 (record 8 has 3.0, record 9 has '')",
        "other.csv: records that cannot be read: 1 "
        "(record 10 has 2 cells on line 11, where the header has 3)",
        "other.csv: records that are not UTF-8: 1 (record 11)",
        "other.csv: test rows with more than one prediction: 1 (data/a.csv row 1)",
        "other.csv: test rows without a prediction: 1 (data/b.csv row 1)",
    ]


def test_only_the_first_of_many_are_shown(problems):
    rows = pd.DataFrame({"file": "a.csv", "row": range(2000)})
    assert problems("row,prediction\n0,1\n", rows=rows) == [
        "other.csv: test rows without a prediction: 1,999 (a.csv row 1, a.csv row 2, a.csv row 3, "
        "...)"
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "other.csv is empty"),
        ("file,row,prediction\n", "other.csv has no rows"),
        (
            "file,row,Prediction\na,1,1\n",
            "other.csv has no column prediction, did you mean Prediction?",
        ),
        ("file,row,row,prediction\na,1,1,1\n", "other.csv has more than one column row"),
        (GOOD.encode("utf-16"), "other.csv is UTF-16 and not UTF-8; save it as UTF-8"),
        (
            'file,row,prediction\na,1,"x\n',
            "other.csv line 2 column 5: a quote is opened and never closed",
        ),
    ],
)
def test_what_is_no_table_of_predictions(problems, content, expected):
    assert problems(content) == [expected]


def test_columns_are_named_together(problems):
    assert problems("a,b\n1,2\n") == [
        f"other.csv has no column {name}" for name in ("file", "row", "prediction")
    ]


def test_numbers_in_place_of_labels_are_refused(problems):
    content = GOOD.replace(",1\n", ",2\n", 1).replace("NA", "0").replace("sql", "0")
    content = content.replace("other", "3")
    assert problems(content) == [
        "other.csv: no prediction is a label: '0', '2', '3'; the labels are '1', 'NA', 'sql'"
    ]


@pytest.mark.parametrize("name", [f"{system}.csv" for system in OWN_SYSTEMS])
def test_names_of_own_systems_are_refused(problems, name):
    assert "is the name of a system" in problems(GOOD, name)[0]


@pytest.mark.parametrize("name", ["my system.csv", "a.b.csv", "é.csv", "$(x).csv", ".csv"])
def test_names_that_are_no_part_of_a_metric_are_refused(problems, name):
    assert len(problems(GOOD, name)) == 1


def test_other_formats_and_places_are_refused(problems, tmp_path, test_rows):
    assert problems(GOOD, "a.tsv") == ["a.tsv: predictions are read from a file that ends in .csv"]
    with pytest.raises(UserError, match=r"a.tv does not exist, did you mean a.tsv\?"):
        read_predictions(tmp_path / "a.tv", test_rows, LABELS)
    with pytest.raises(UserError, match="has no CSV file"):
        read_predictions(tmp_path, test_rows, LABELS)
    with pytest.raises(UserError, match="only where there are labels"):
        read_predictions(tmp_path, test_rows, [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD.replace(",sql", ","), "records whose prediction is empty: 1 (record 3)"),
        (GOOD.replace(",", ";"), "its columns are separated by ';', write commas"),
        (GOOD.replace(",", "\t"), "its columns are separated by '\\t', write commas"),
    ],
)
def test_what_exports_of_others_get_wrong(tmp_path, test_rows, content, expected):
    path = tmp_path / "system.CSV"
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        read_predictions(tmp_path, test_rows, LABELS)
    assert expected in str(refused.value)
