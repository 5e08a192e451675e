"""Files in the layouts of more public datasets, with invented words: lines and folders of text,
tables without a header, other alphabets, and what `datasets` and pandas write.
"""

from __future__ import annotations

import json
import random
import re

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from tests.dataset.validation.test_layouts import (
    Read,
    quoted,
    refusal,
    texts,
    write_lines,
    write_rows,
    write_table,
)

LABELS = ("no", "yes")


def rows_of(count: int, labels=LABELS, seed: int = 0) -> list[dict]:
    """Return rows with a text and a label."""
    found = enumerate(texts(count, seed))
    return [{"text": text, "label": labels[n % len(labels)]} for n, text in found]


def pairs_of(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["text"], str(row["label"])) for row in rows]


# --- messages and tweets --------------------------------------------------------------------------


def test_spam_csv(tmp_path):
    lines, expected = ["v1,v2,,,"], []
    for n, text in enumerate(texts(40)):
        label, text = ("ham", "spam")[n % 2], f"\xa3{n} {text} \xfc"
        if n % 3 == 0:
            text += ', "so" ba'
            cell = '"' + text.replace('"', '""') + '"'
        else:
            cell = text
        lines.append(f"{label},{cell},,,")
        expected.append((text, label))
    train = write_lines(tmp_path / "spam.csv", lines, "latin-1", "\r\n")
    found = Read(train, text_column="v2", label_column="v1")
    assert found.pairs() == expected
    assert "it was read as Windows-1252" in found.notes
    assert found.findings.empty


def test_sms_spam_collection(tmp_path):
    rows = [(("ham", "spam")[n % 3 == 1], text) for n, text in enumerate(quoted(60))]
    found = Read(write_table(tmp_path / "SMSSpamCollection", "", rows))
    assert found.pairs() == [(text, label) for label, text in rows]
    assert "no header line" in found.notes


def test_the_folder_of_the_sms_spam_collection(tmp_path):
    folder = tmp_path / "sms"
    write_table(folder / "SMSSpamCollection", "", [("ham", text) for text in texts(24)])
    write_lines(folder / "readme", texts(9))
    assert "SMSSpamCollection" in refusal(folder)


@pytest.mark.parametrize("separator", ["\t", ";"])
@pytest.mark.parametrize("quoted_row", [0, 1, 7])
def test_a_single_quote_in_a_file_without_a_header(tmp_path, separator, quoted_row):
    rows = pairs_of(rows_of(60))
    rows[quoted_row] = (f'"{rows[quoted_row][0]}', rows[quoted_row][1])
    train = write_lines(tmp_path / "t.txt", [f"{text}{separator}{label}" for text, label in rows])
    assert Read(train).pairs() == rows


@pytest.mark.parametrize("count", [48, 12])
def test_emotion(tmp_path, count):
    folder = tmp_path / "emotion"
    labels = ("joy", "sadness", "anger", "fear", "love", "surprise")
    for seed, name in enumerate(("train", "val", "test")):
        rows = rows_of(48 if name == "train" else count, labels, seed)
        write_lines(folder / f"{name}.txt", [f"{row['text']};{row['label']}" for row in rows])
    found = Read(folder)
    assert found.pairs("train") == pairs_of(rows_of(48, labels))
    assert found.pairs("validation") == pairs_of(rows_of(count, labels, 1))
    assert found.pairs("test") == pairs_of(rows_of(count, labels, 2))


@pytest.mark.parametrize("ending", ["", ", #zan"])
def test_germeval_2018(tmp_path, ending):
    fine = ("INSULT", "OTHER", "ABUSE", "OTHER", "PROFANITY", "OTHER", "OTHER")
    rows = []
    for n, text in enumerate(quoted(60)):
        coarse = "OTHER" if fine[n % 7] == "OTHER" else "OFFENSE"
        rows.append((f"@zan {text}|LBR|\xdc\xe4\xdf \U0001f600{ending}", coarse, fine[n % 7]))
    train = write_table(tmp_path / "germeval2018.training.txt", "", rows)
    names = ("text", "coarse", "label")
    assert Read(train, column_names=names).pairs() == [(text, fine) for text, _, fine in rows]
    assert Read(train).pairs() == [(text, coarse) for text, coarse, _ in rows]


def hanzi(count: int, length: int = 20) -> list[str]:
    """Return texts of characters that are in GB 2312."""
    rng = random.Random(0)

    def text() -> str:
        pairs = [(rng.randint(0xB0, 0xD6), rng.randint(0xA1, 0xFE)) for _ in range(length)]
        return "".join(bytes(pair).decode("gb2312", "ignore") for pair in pairs)

    return [f"{text()}\uff0c{text()}\u3002" for _ in range(count)]


def in_letters(letters: str, count: int) -> list[str]:
    rng = random.Random(0)
    words = [["".join(rng.choices(letters, k=5)) for _ in range(8)] for _ in range(count)]
    return [f"@ra {' '.join(text)} #{text[0]}" for text in words]


TWEETS = {
    "gb18030": hanzi(40),
    "cp1256": in_letters("ابتثجحخدسشعفقكلمنهوي", 40),
    "cp1251": in_letters("абвгдежзиклмнопрсту", 40),
}


@pytest.mark.parametrize("alphabet", TWEETS)
def test_tweets_in_other_alphabets(tmp_path, alphabet):
    rows = [(f"{text} \U0001f600", LABELS[n % 2]) for n, text in enumerate(TWEETS[alphabet])]
    lines = [f"{n},{text},{label}" for n, (text, label) in enumerate(rows)]
    train = write_lines(tmp_path / "t.csv", ["id,text,label", *lines], "utf-8-sig", "\r\n")
    found = Read(train, max_length=512)
    assert found.pairs() == rows
    assert found.findings.empty


@pytest.mark.parametrize("encoding", TWEETS)
def test_tweets_that_are_not_utf_8(tmp_path, encoding):
    rows = [(text, LABELS[n % 2]) for n, text in enumerate(TWEETS[encoding])]
    lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    train = write_lines(tmp_path / "t.csv", lines, encoding)
    assert Read(train, max_length=512, encoding=encoding).pairs() == rows
    assert "data.encoding" in refusal(train, max_length=512)


# --- lines and folders of text --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.txt", "train.conll"])
def test_conll_2003(tmp_path, name):
    lines = ["-DOCSTART- -X- -X- O", ""]
    for text in texts(30):
        words = text.rstrip(".").split()
        lines += [f"{word} NN B-NP {'B-PER' if word < 'd' else 'O'}" for word in words]
        lines += [", , O O", ". . O O", ""]
    message = refusal(write_lines(tmp_path / name, lines))
    assert "CoNLL" in message and "a row for each sentence" in message


def test_fasttext(tmp_path):
    rows = [(f'{text} , "', LABELS[n % 2]) for n, text in enumerate(texts(40))]
    lines = [f"__label__{label} {text}" for text, label in rows]
    assert Read(write_lines(tmp_path / "cooking.txt", lines)).pairs() == rows
    # Amazon's reviews are two files.
    folder = tmp_path / "reviews"
    for name, part in {"train.ft.txt": lines[:30], "test.ft.txt": lines[30:]}.items():
        write_lines(folder / name, part)
    assert "set data.train_files" in refusal(folder)
    files = {"train_files": "train.ft.txt", "test_files": "test.ft.txt"}
    found = Read(folder, test=str(folder), **files)
    assert found.pairs("train", "validation") == rows[:30]
    assert found.pairs("test") == rows[30:]


def test_fasttext_with_several_labels(tmp_path):
    lines = [f"__label__yes __label__no {text}" for text in texts(24)]
    assert "has 2 labels (__label__NAME)" in refusal(write_lines(tmp_path / "c.txt", lines))


def test_acl_imdb(tmp_path):
    folder = tmp_path / "aclImdb"
    expected = {"train": [], "test": []}
    for seed, split in enumerate(expected):
        for number, label in enumerate(("neg", "pos")):
            for n, text in enumerate(texts(24, 10 * seed + number)):
                content = f'{text}<br /><br />"{text}'
                path = folder / split / label / f"{n}_{1 + 8 * number}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)  # without a line end
                expected[split].append((content, label))
        for name in ("urls_neg.txt", "urls_pos.txt"):
            write_lines(folder / split / name, ["http://www.example.com/zan"] * 24)
        write_lines(folder / split / "labeledBow.feat", ["9 0:9 1:1 2:4"] * 24)
    for n, text in enumerate(texts(40, 99)):
        write_lines(folder / "train" / "unsup" / f"{n}_0.txt", [text])
    write_lines(folder / "train" / "urls_unsup.txt", ["http://www.example.com/zan"] * 40)
    write_lines(folder / "imdb.vocab", texts(9))
    write_lines(folder / "imdbEr.txt", ["0.049", "-0.1"])
    write_lines(folder / "README", texts(9))
    found = Read(folder, max_length=512)
    assert sorted(found.pairs("train", "validation")) == sorted(expected["train"])
    assert sorted(found.pairs("test")) == sorted(expected["test"])
    assert "labels are the names of the folders" in found.notes
    unread = {path.name for path in found.validated.ignored}
    assert {"0_0.txt", "urls_pos.txt", "imdb.vocab", "README"} <= unread


def test_a_book_of_gutenberg(tmp_path):
    rng = random.Random(0)
    lines = ["The Project Zan eBook of Ra", "", "*** START OF THE EBOOK RA ***", ""]
    paragraphs = iter(texts(200, words=40))
    for chapter in range(1, 13):
        lines += ["", "", f"CHAPTER {chapter}", "", "    The Zan", ""]
        for _ in range(rng.randint(6, 12)):
            words = next(paragraphs).split()
            lines += [" ".join(words[n : n + 10]) for n in range(0, len(words), 10)]
            lines += ["", '"No," ba de.', ""]  # a paragraph that repeats itself
        lines += ["       *       *       *", ""]
    train = write_lines(tmp_path / "pg1.txt", lines, "utf-8-sig", "\r\n")
    found = Read(train, task="text")
    rows = found.rows.sort_values("row")
    written = [line for line in lines if line]
    read = [line for line in "".join(rows["text"]).split("\n") if line]
    assert read == written
    assert set(rows["split"]) == {"train", "validation", "test"}
    assert not found.findings["dropped"].any()
    assert not rows["text"].str.contains("\ufeff|\r", regex=True).any()
    # A passage begins with a paragraph.
    starts = [n for n in range(len(lines)) if lines[n] and not lines[n - 1]]
    assert set(rows["row"]) <= {n + 1 for n in (0, *starts)}


# --- what `datasets` and pandas write -------------------------------------------------------------

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})


def hub(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=FEATURES)


def test_save_to_disk(tmp_path):
    rows = rows_of(60)
    hub(rows).save_to_disk(tmp_path / "one", num_shards=2)
    assert Read(tmp_path / "one").pairs() == pairs_of(rows)
    parts = DatasetDict({"train": hub(rows[:48]), "test": hub(rows[48:])})
    parts.save_to_disk(tmp_path / "dict")
    found = Read(tmp_path / "dict")
    assert found.pairs("train", "validation") == pairs_of(rows[:48])
    assert found.pairs("test") == pairs_of(rows[48:])


def test_a_test_split_of_the_hub_without_labels(tmp_path):
    rows = rows_of(60)
    folder = tmp_path / "sst2" / "data"
    folder.mkdir(parents=True)
    parts = {"train": rows[:48], "validation": rows[48:], "test": rows_of(9, [-1], seed=1)}
    for name, part in parts.items():
        hub(part).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    files = {"train_files": "data/train-*", "validation_files": "data/validation-*"}
    found = Read(folder.parent, validation=str(folder.parent), **files)
    assert found.pairs("train", "test") == pairs_of(rows[:48])
    assert found.pairs("validation") == pairs_of(rows[48:])
    message = refusal(folder.parent)
    assert "rows of test have the label -1" in message
    assert "data.test" in message


@pytest.mark.parametrize("orient", ["columns", "index", "split", "records", "table", "values"])
@pytest.mark.parametrize("indent", [None, 2])
def test_to_json_of_pandas(tmp_path, orient, indent):
    rows = rows_of(40)
    train = tmp_path / "rows.json"
    pd.DataFrame(rows).to_json(train, orient=orient, indent=indent)
    if orient == "values":
        assert "data.column_names" in refusal(train)
        assert Read(train, column_names=("text", "label")).pairs() == pairs_of(rows)
    else:
        assert Read(train).pairs() == pairs_of(rows)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_with_a_list_for_each_column(tmp_path, indent):
    rows = rows_of(40)
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    train = tmp_path / "rows.json"
    train.write_text(json.dumps({"id": list(range(40)), **columns}, indent=indent))
    assert Read(train).pairs() == pairs_of(rows)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_with_an_object_in_each_file(tmp_path, indent):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = rows_of(40)
    for n, row in enumerate(rows):
        (folder / f"{n:03}.json").write_text(json.dumps({"id": n, **row}, indent=indent))
    found = Read(folder)
    assert found.pairs() == pairs_of(rows)
    assert set(found.rows["row"]) == {1}


# --- cells that are objects and lists -------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_translation(tmp_path, suffix):
    rows = [
        {"id": str(n), "translation": {"de": f"ü {text}", "en": text}}
        for n, text in enumerate(texts(40))
    ]
    found = Read(
        write_rows(tmp_path / f"rows{suffix}", rows),
        task="completion",
        prompt_template="English: {translation.en}\nGerman:",
        completion_column="translation.de",
    )
    assert found.pairs() == [(text, f"ü {text}") for text in texts(40)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_mmlu(tmp_path, suffix):
    rows = [
        {
            "question": text,
            "subject": "zan",
            "choices": [f"ba {n}", f"de {n}", f"fi {n}", f"go {n}"],
            "answer": n % 4,
        }
        for n, text in enumerate(texts(60))
    ]
    train = tmp_path / f"rows{suffix}"
    answers = [str(row["answer"]) for row in rows]
    if suffix == ".parquet":
        names = ClassLabel(names=["A", "B", "C", "D"])
        kinds = {"question": Value("string"), "subject": Value("string"), "answer": names}
        kinds["choices"] = List(Value("string"))
        Dataset.from_list(rows, features=Features(kinds)).to_parquet(train)
        answers = ["ABCD"[row["answer"]] for row in rows]
    else:
        write_rows(train, rows)
    found = Read(train, label_column="answer", prompt_template="{question}\n{choices}\nAnswer:")
    expected = ["\n".join([row["question"], *row["choices"]]) for row in rows]
    assert found.pairs() == list(zip(expected, answers, strict=True))
    each = "{question}\nA. {choices.0}\nB. {choices.1}\nC. {choices.2}\nD. {choices.3}"
    found = Read(train, label_column="answer", prompt_template=f"{each}\nAnswer:")
    assert [text for text, _ in found.pairs()] == [
        "\n".join(
            [r["question"], *(f"{a}. {c}" for a, c in zip("ABCD", r["choices"], strict=True))]
        )
        for r in rows
    ]


@pytest.mark.parametrize("names", [None, ["joy", "anger", "fear"]])
def test_goemotions(tmp_path, names):
    rows = [{"text": text, "labels": [n % 3], "id": f"e{n}"} for n, text in enumerate(texts(60))]
    train = tmp_path / "rows.parquet"
    params = {"label_column": "labels"}
    if names is None:
        train = write_rows(tmp_path / "rows.jsonl", rows)
    else:
        kinds = {"text": Value("string"), "labels": List(ClassLabel(names=names))}
        features = Features({**kinds, "id": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(train)
    shown = names or ["0", "1", "2"]
    expected = [(row["text"], shown[row["labels"][0]]) for row in rows]
    assert Read(train, **params).pairs() == expected


def test_goemotions_with_several_labels(tmp_path):
    rows = [{"text": t, "labels": [n % 3, 4][: 1 + n % 2]} for n, t in enumerate(texts(60))]
    train = write_rows(tmp_path / "rows.jsonl", rows)
    found = Read(train, label_column="labels", max_invalid_fraction=0.6)
    assert found.pairs() == [(r["text"], str(r["labels"][0])) for r in rows[::2]]
    message = refusal(train, label_column="labels")
    assert "invalid rows: 30 of 60" in message
    assert re.search("several labels|2 labels|one label|labels.0", message)
