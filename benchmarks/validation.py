"""Measure the leak detection, time and memory of `validate`.

python -m benchmarks.validation [--rows N | --files N]

Without `--rows`, the benchmark plants exact and edited copies of training texts among the test
texts, and prints how many of them are found. The texts are synthetic and initially free of
near-duplicates: of each pair with a similarity at or above the threshold, one text is removed.
These pairs are found by an exact join instead of MinHash: if two sets share a fraction t of each,
then the rarest 1 - t of their elements plus n more share n elements (Chaudhuri, Ganti and Kaushik,
"A primitive operator for similarity joins in data cleaning", 2006).

With `--rows N`, it writes N rows of 500 bytes: 1 % are exact copies of earlier rows, 1 % are edited
copies. It validates them in a separate process and prints the peak resident memory that the
operating system reports.

With `--files N`, it writes N texts of 1.4 kB, each to a file in a folder that is named as its
label, and validates them in the same way.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import CountVectorizer
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tqdm import tqdm

from gptj8.dataset.prepared.text_encoder import TextEncoder
from gptj8.dataset.validation.near_duplicates import SHINGLE, normalize, similarity
from gptj8.dataset.validation.run import validate
from gptj8.params.sections import Data

THRESHOLD = 0.6
TEXTS = 20_000
TEST_SHARE = 4  # one of four texts is in the test file
VOCABULARY = 30_000
BLOCK = 10_000

# "{}" is one word, "{+}" is 3 to 9 words.
TEMPLATES = (
    "Write a short story about a {} and a {} who {+}.",
    "Summarize the following paragraph in two sentences for a {} reader: {+} {+}.",
    "Translate this sentence from {} to {}: {+}.",
    "Classify the following review as positive or negative: {+} {+}.",
    "List three reasons why a {} should {+} before the {}.",
    "Rewrite the following sentence in a more {} tone: {+}.",
)


class Words:
    """Synthetic words with Zipf-distributed frequencies; frequent words are shorter."""

    def __init__(self, seed: int = 0) -> None:
        shuffled = random.Random(seed)
        known: dict[str, None] = {}
        while len(known) < VOCABULARY:
            length = max(1, round(shuffled.gauss(1.5 + 0.66 * np.log(len(known) + 1), 1.6)))
            vowels, consonants = "eeeaaaiioou", "ttnnssrrhlldcmfpgwybvkxz"
            first = shuffled.random() < 0.3
            letters = (shuffled.choice((vowels, consonants)[i % 2 ^ first]) for i in range(length))
            known["".join(letters)] = None
        self.words = list(known)
        weights = 1 / (np.arange(VOCABULARY) + 2.7)
        self._cumulative = np.cumsum(weights / weights.sum())

    def draw(self, rng: np.random.Generator, shape: int | tuple[int, ...]) -> np.ndarray:
        """Return random word indices."""
        found = np.searchsorted(self._cumulative, rng.random(shape))
        return np.minimum(found, VOCABULARY - 1)

    def take(self, rng: np.random.Generator, count: int) -> list[str]:
        """Return random words."""
        return [self.words[number] for number in self.draw(rng, count)]


def sentences(words: Words, rng: np.random.Generator, low: int, high: int) -> str:
    """Return a text of `low` to `high` words, in sentences of up to 18."""
    left, parts = int(rng.integers(low, high + 1)), []
    while left:
        taken = words.take(rng, min(left, int(rng.integers(6, 19))))
        if len(taken) > 9:
            taken[len(taken) // 2] += ","
        parts.append(f"{' '.join(taken).capitalize()}.")
        left -= len(taken)
    return " ".join(parts)


def tweet(words: Words, rng: np.random.Generator) -> str:
    """Return 8 to 20 words; some texts start with a mention, some end with a link."""
    who, link = words.words[rng.integers(VOCABULARY)], f"{rng.integers(36**8):x}"
    frame = ["{}"] * 7 + ["@" + who + " {}"] * 2 + ["{} https://t.co/" + link]
    return frame[rng.integers(10)].format(sentences(words, rng, 8, 20))


def instruction(words: Words, rng: np.random.Generator) -> str:
    """Return one of the templates, filled with random words."""
    text = TEMPLATES[rng.integers(len(TEMPLATES))]
    while "{+}" in text:
        text = text.replace("{+}", " ".join(words.take(rng, int(rng.integers(3, 10)))), 1)
    return text.format(*words.take(rng, 4))


CORPORA: dict[str, Callable[..., str]] = {
    "tweets": tweet,
    "paragraphs": lambda words, rng: sentences(words, rng, 40, 120),
    "instructions": instruction,
}


def similar_pairs(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Return all pairs of texts with at least the given similarity, as (pairs, 2) indices."""
    counter = CountVectorizer(
        analyzer="char", ngram_range=(SHINGLE, SHINGLE), binary=True, lowercase=False
    )
    found = csr_array(counter.fit_transform(map(normalize, texts)), dtype=np.int32)
    found = csr_array(found[:, np.argsort(found.sum(axis=0), kind="stable")])
    found.sort_indices()  # the rarest shingle of each text first
    sizes = np.diff(found.indptr)
    least = max(1, sizes.min() // 10)
    ends = found.indptr[:-1] + sizes - np.ceil(threshold * sizes) + least
    rare = found.copy()
    rare.data = (np.arange(found.nnz) < np.repeat(ends, sizes)).astype(np.int32)
    rare.eliminate_zeros()
    columns = csr_array(rare.T)
    kept = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(texts), 500):
        common = (rare[start : start + 500] @ columns).tocoo()
        likely = common.data >= least
        one, other = common.row[likely] + start, common.col[likely]
        one, other = one[one < other], other[one < other]
        shared = found[one].multiply(found[other]).sum(axis=1)
        alike = shared / (sizes[one] + sizes[other] - shared) >= threshold
        kept.append(np.stack([one[alike], other[alike]], axis=1))
    return np.concatenate(kept)


def corpus(make: Callable[..., str], words: Words, count: int) -> list[str]:
    """Return texts without pairs whose similarity reaches the threshold."""
    rng = np.random.default_rng(0)
    texts = [make(words, rng) for _ in range(count + count // 4)]
    gone = set(similar_pairs(texts, THRESHOLD)[:, 1].tolist())
    return [text for index, text in enumerate(texts) if index not in gone][:count]


def change_punctuation(text: str, words: Words, rng: np.random.Generator) -> str:
    parts = text.replace(",", "").rstrip(".?").split()
    parts[int(rng.integers(len(parts)))] += " -"
    return " ".join(parts) + str(rng.choice(["!", "...", "?!", ""]))


def change_word(text: str, words: Words, rng: np.random.Generator) -> str:
    parts = text.split()
    place = int(rng.choice([i for i, part in enumerate(parts) if part.isalpha()]))
    parts[place] = next(word for word in words.take(rng, 99) if word != parts[place])
    return " ".join(parts)


def change_case(text: str, words: Words, rng: np.random.Generator) -> str:
    return text.upper() if rng.random() < 0.5 else text.lower()


def change_all(text: str, words: Words, rng: np.random.Generator) -> str:
    text = change_punctuation(change_word(text, words, rng), words, rng)
    return change_case(text, words, rng)


EDITS: dict[str, Callable[[str, Words, np.random.Generator], str]] = {
    "none": lambda text, words, rng: text,
    "case": change_case,
    "punctuation": change_punctuation,
    "one word": change_word,
    "all three": change_all,
}


class Leaks(NamedTuple):
    """Result of `find_leaks`.

    Attributes:
        planted: number of planted copies.
        alike: fraction of the planted copies whose similarity reaches the threshold.
        recall: fraction of the planted copies that were found.
        precision: fraction of the reported leaks that were planted.
    """

    planted: int
    alike: float
    recall: float
    precision: float


def find_leaks(
    texts: Sequence[str], planted: int, edit: str, words: Words, encoder: TextEncoder, folder: Path
) -> Leaks:
    """Plant edited copies of training texts in the test file and evaluate the reported leaks."""
    rng = np.random.default_rng([planted, *edit.encode()])
    size = len(texts) // TEST_SHARE
    rows = {"train": list(texts[size:]), "test": list(texts[:size])}
    sources = rng.choice(len(rows["train"]), planted, replace=False).tolist()
    expected, alike = set(), 0
    for source, place in zip(sources, rng.choice(size, planted, replace=False), strict=True):
        text = rows["train"][source]
        rows["test"][place] = edited = EDITS[edit](text, words, rng)
        alike += similarity(normalize(text), normalize(edited)) >= THRESHOLD
        expected.add((source + 1, int(place) + 1))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        files = {split: Path(name) / f"{split}.txt" for split in rows}
        for split, file in files.items():
            file.write_text("\n".join(rows[split]) + "\n", encoding="utf-8")
        (prepared := Path(name) / "prepared").mkdir()
        paths = {split: str(file) for split, file in files.items()}
        policy = {"on_leak": "warn", "near_duplicate_threshold": THRESHOLD}
        findings = validate(Data(**paths, task="text", **policy), encoder, prepared).findings
        leaks = findings.frame().query("check in ('leak', 'near_leak')")
    reported = set(zip(leaks["row"], leaks["other_row"], strict=True))
    found = len(reported & expected)
    return Leaks(planted, alike / planted, found / planted, found / max(len(reported), 1))


def report_leaks(folder: Path) -> None:
    """Print the tables of leak detection."""
    words = Words()
    print("| corpus | leaks | edit | planted | above threshold | recall | precision |")
    print("|---|---|---|---|---|---|---|")
    for name, make in CORPORA.items():
        texts = corpus(make, words, TEXTS)
        encoder = TextEncoder(train_tokenizer(texts), eos_id=0)
        for rate, edit in itertools.product((0.01, 0.06), EDITS):
            leaks = find_leaks(
                texts, round(rate * TEXTS / TEST_SHARE), edit, words, encoder, folder
            )
            print(f"| {name} | {rate:.0%} | {edit} | {leaks.planted} | {leaks.alike:.1%} ", end="")
            print(f"| {leaks.recall:.1%} | {leaks.precision:.1%} |", flush=True)
    print("\n| words, one changed | above threshold | recall |\n|---|---|---|")
    for length in (5, 8, 12, 20, 40):
        texts = corpus(lambda w, rng, n=length: sentences(w, rng, n, n), words, 4000)
        leaks = find_leaks(texts, 1000, "one word", words, encoder, folder)
        print(f"| {length} | {leaks.alike:.1%} | {leaks.recall:.1%} |", flush=True)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with 8,000 tokens."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False
    )
    return tokenizer._tokenizer


def write_rows(file: Path, count: int) -> list[str]:
    """Write prompts with labels, 2 % of them copies; return the first texts.

    In each hundred rows, row 51 is a copy of row 14, and row 76 is row 39 with one changed word, in
    capitals and without the full stop.
    """
    words, rng = Words(), np.random.default_rng(0)
    sample: list[str] = []
    with (
        open(file, "w", encoding="utf-8") as stream,
        tqdm(total=count, unit=" rows", unit_scale=True, desc="write") as bar,
    ):
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            drawn = words.draw(rng, (size, 75)).tolist()
            texts = [f"{' '.join(map(words.words.__getitem__, row))}." for row in drawn]
            labels = [number % 3 for number in range(size)]
            for row in range(50, size, 100):
                texts[row], labels[row] = texts[row - 37], labels[row - 37]
            for row in range(75, size, 100):
                texts[row] = change_word(texts[row - 37], words, rng).rstrip(".").upper()
            sample = sample or texts
            lines = zip(texts, labels, strict=True)
            stream.writelines(f'{{"prompt": "{t}", "label": "topic {n}"}}\n' for t, n in lines)
            bar.update(size)
    return sample


def write_files(folder: Path, count: int) -> list[str]:
    """Write texts of 200 words to files in folders for two labels; return the first texts."""
    words, rng = Words(), np.random.default_rng(0)
    sample: list[str] = []
    for number in tqdm(range(count), desc="write"):
        text = " ".join(map(words.words.__getitem__, words.draw(rng, 200).tolist()))
        file = folder / ("train", "test")[number % 2] / ("neg", "pos")[number // 2 % 2]
        file.mkdir(parents=True, exist_ok=True)
        (file / f"{number}.txt").write_text(text)
        sample += [text] if number < BLOCK else []
    return sample


def report_speed(rows: int, files: int, folder: Path) -> None:
    """Write rows or files and validate them in a separate process."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        if files:
            sample = write_files(Path(name) / "files", files)
        else:
            sample = write_rows(Path(name) / "rows.jsonl", rows)
        train_tokenizer(sample).save(f"{name}/tokenizer.json")
        command = [sys.executable, "-m", "benchmarks.validation", "--measure", name]
        subprocess.run(command, check=True)


def measure(folder: Path) -> None:
    """Validate the rows of `report_speed`; print time, memory and findings."""
    file, prepared = folder / "rows.jsonl", folder / "prepared"
    if not file.exists():
        measure_files(folder / "files", prepared)
        return
    prepared.mkdir()
    encoder = TextEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")), eos_id=0)
    validated = validate(Data(train=str(file), text_column="prompt"), encoder, prepared)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows, seconds, findings = validated.total_rows.total(), validated.seconds, validated.findings
    speed = f"{seconds:.0f} s, {rows / seconds:,.0f} rows per second"
    print(f"{rows:,} rows, {file.stat().st_size / 1e9:.2f} GB: {speed}")
    written = sum(f.stat().st_size for f in prepared.rglob("*") if f.is_file())
    print(f"peak resident memory {peak:.2f} GiB; {written / 1e9:.2f} GB written")
    planted = {"duplicate": (rows + 49) // 100, "near_duplicate": (rows + 24) // 100}
    for check in dict.fromkeys([*planted, *findings.checks()]):
        print(f"{check}: {findings.count(check):,} found of {planted.get(check, 0):,} planted")
    print("problems:", "; ".join(validated.problems) or "none")


def measure_files(files: Path, prepared: Path) -> None:
    """Validate the files of `report_speed`; print the time."""
    prepared.mkdir()
    encoder = TextEncoder(Tokenizer.from_file(str(files.parent / "tokenizer.json")), eos_id=0)
    validated = validate(Data(train=str(files)), encoder, prepared)
    print(f"{validated.total_rows.total():,} files: {validated.seconds:.0f} s")
    print("problems:", "; ".join(validated.problems) or "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="measure time and memory with this many rows")
    parser.add_argument("--files", type=int, default=0, help="measure time with this many files")
    parser.add_argument("--leaks-only", action="store_true", help="ignore --rows")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
    elif (arguments.rows or arguments.files) and not arguments.leaks_only:
        report_speed(arguments.rows or 0, arguments.files, arguments.folder)
    else:
        report_leaks(arguments.folder)


if __name__ == "__main__":
    main()
