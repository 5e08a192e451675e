"""Predictions of external systems are read as text, and all problems are listed in one error."""

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
    """Write a file (text or bytes) and return the lines of the error without the directory."""

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


def test_predictions_are_read_in_any_order_as_text(tmp_path, test_rows):
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


def test_file_column_is_optional_for_a_single_file(tmp_path, one_file, test_rows):
    path = tmp_path / "other.csv"
    path.write_text("row,prediction\n7,a\n5,b\n3,c\n1,1\n")
    assert read_predictions(path, one_file, LABELS)["other"].tolist() == ["1", "c", "b", "a"]
    with pytest.raises(UserError, match=r"other\.csv has no column file$"):
        read_predictions(path, test_rows, LABELS)
    path.write_text("file,row,prediction\n" + "".join(f"b.csv,{row},1\n" for row in (1, 3, 5, 7)))
    with pytest.raises(
        UserError, match=r"records that match no test row: 4 \(record 1 has b.csv row 1, "
    ):
        read_predictions(path, one_file, LABELS)


def test_all_csv_files_of_a_directory_are_read(tmp_path, test_rows):
    for name in ("b.csv", "a.csv", "notes.txt"):
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "folder.csv").mkdir()
    predictions = read_predictions(tmp_path, test_rows, LABELS)
    assert list(predictions) == ["a", "b"]
    np.testing.assert_array_equal(predictions["a"], predictions["b"])


def test_problems_of_all_files_are_listed(tmp_path, test_rows):
    (tmp_path / "one.csv").write_text(GOOD.replace("data/a.csv,3,NA\n", ""))
    (tmp_path / "tuned.csv").write_text(GOOD)
    (tmp_path / "two.csv").write_text("")
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "my system.csv").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        read_predictions(tmp_path, test_rows, LABELS)
    assert str(caught.value).replace(f"{tmp_path}/", "").split("\n") == [
        "my system.csv: a system name can have only letters, digits, _ and -; rename the file",
        "one.csv: test rows without a prediction: 1 (data/a.csv row 3)",
        "tuned.csv: tuned is the name of a built-in system; rename the file",
        "two.csv is empty",
    ]


def test_all_problems_of_a_file_are_listed(problems):
    content = GOOD.encode() + (
        b"data/a.csv,1,1\ndata/a.csv,1,NA\ndata/a.csv,2,1\ndata/c.csv,1,\xc3\xbc\n"
        b"data/a.csv,3.0,1\ndata/a.csv,,1\ndata/b.csv,7\ndata/b.csv,7,\xff\n"
    )
    content = content.replace(b"data/b.csv,1,sql\n", b"")
    assert problems(content) == [
        "other.csv: records that match no test row: 2 "
        "(record 6 has data/a.csv row 2, record 7 has data/c.csv row 1)",
        "other.csv: records whose row is not an integer: 2 (record 8 has 3.0, record 9 has '')",
        "other.csv: unreadable records: 1 (record 10 has 2 cells on line 11, but the header has 3)",
        "other.csv: records that are not UTF-8: 1 (record 11)",
        "other.csv: test rows with more than one prediction: 1 (data/a.csv row 1)",
        "other.csv: test rows without a prediction: 1 (data/b.csv row 1)",
    ]


def test_only_the_first_examples_are_shown(problems):
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
        ("file,row,row,prediction\na,1,1,1\n", "other.csv has repeated column names: row"),
        (GOOD.encode("utf-16"), "other.csv is UTF-16; save it as UTF-8"),
        (
            'file,row,prediction\na,1,"x\n',
            "other.csv line 2 column 5: a quote is opened and never closed",
        ),
    ],
)
def test_invalid_csv_files_raise(problems, content, expected):
    assert problems(content) == [expected]


def test_all_missing_columns_are_listed(problems):
    assert problems("a,b\n1,2\n") == [
        f"other.csv has no column {name}" for name in ("file", "row", "prediction")
    ]


def test_label_indices_instead_of_labels_raise(problems):
    content = GOOD.replace(",1\n", ",2\n", 1).replace("NA", "0").replace("sql", "0")
    content = content.replace("other", "3")
    assert problems(content) == [
        "other.csv: no prediction is a known label: '0', '2', '3'; the labels are '1', 'NA', 'sql'"
    ]


@pytest.mark.parametrize("name", [f"{system}.csv" for system in OWN_SYSTEMS])
def test_names_of_built_in_systems_raise(problems, name):
    assert "is the name of a built-in system" in problems(GOOD, name)[0]


@pytest.mark.parametrize("name", ["my system.csv", "a.b.csv", "é.csv", "$(x).csv", ".csv"])
def test_names_that_are_invalid_in_metrics_raise(problems, name):
    assert len(problems(GOOD, name)) == 1


def test_invalid_paths_and_tasks_raise(problems, tmp_path, test_rows):
    assert problems(GOOD, "a.tsv") == ["a.tsv: predictions must be in a .csv file"]
    with pytest.raises(UserError, match=r"a.tv does not exist, did you mean a.tsv\?"):
        read_predictions(tmp_path / "a.tv", test_rows, LABELS)
    with pytest.raises(UserError, match="has no CSV files"):
        read_predictions(tmp_path, test_rows, LABELS)
    with pytest.raises(UserError, match="only for a task with labels"):
        read_predictions(tmp_path, test_rows, [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD.replace(",sql", ","), "records with an empty prediction: 1 (record 3)"),
        (GOOD.replace(",", ";"), "the columns are separated by ';', use commas"),
        (GOOD.replace(",", "\t"), "the columns are separated by '\\t', use commas"),
    ],
)
def test_common_export_mistakes_raise(tmp_path, test_rows, content, expected):
    path = tmp_path / "system.CSV"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_predictions(tmp_path, test_rows, LABELS)
    assert expected in str(caught.value)
