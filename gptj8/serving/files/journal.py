"""Keep finished answers on disk, so that a killed command goes on where it stopped.

The journal is a file of JSON lines beside the output. Its first line says what the answers depend
on: the input's SHA-256, the model and the settings. If that differs, the journal is refused, so
answers to different inputs or of different models never mix, and none are lost. Each further line
has the answers of one batch and is flushed to disk before the next batch begins. A line that a
crash has cut off is removed, and its batch is repeated.

Rows are answered in windows of consecutive rows, one after another. So only the answers of one
window are in memory, whatever the number of rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import list_files, sha256_file
from gptj8.runtime.manifest import MANIFEST

_LARGEST_HASHED = 64 << 20
_NOT_PART_OF_ANSWERS = ("README.md", "metrics.json")  # contain times, which differ between runs
_MERGED = "merged"


class RowAnswer(NamedTuple):
    """The answer to a row.

    Attributes:
        text: a label or a generated text.
        confidence: of the answer, 0 to 1.
        probabilities: of each label; empty for generated text.
    """

    text: str
    confidence: float
    probabilities: tuple[float, ...] = ()


Answers = dict[int, RowAnswer]
"""Answers by the index of the row in the file."""


class Journal:
    """The finished answers of an output file.

    Args:
        path: the journal.
        depends_on: everything that determines the answers, as JSON.

    Raises:
        UserError: if the journal at `path` depends on something else.

    Attributes:
        window: the window of the last answers; all windows before it are complete.
        answers: the answers of that window that are finished.
        count: the number of finished answers.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self.window = 0
        self.answers: Answers = {}
        self.count = 0
        self._header = (json.dumps(depends_on, sort_keys=True) + "\n").encode()
        end = self._read()
        self._file: IO[bytes] = open(path, "r+b" if end else "wb")  # see `close`
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._append(self._header)

    def add(self, window: int, answers: Mapping[int, RowAnswer]) -> None:
        """Keep the answers of one batch; they are on the disk when this method returns."""
        rows = [[row, *answer] for row, answer in answers.items()]
        self._append((json.dumps({"window": window, "rows": rows}) + "\n").encode())
        self.count += len(answers)

    def windows(self) -> Iterator[tuple[int, Answers]]:
        """Yield the number of each window that has answers, and its answers, in order."""
        with open(self.path, "rb") as lines:
            lines.readline()
            current, answers = 0, Answers()
            for line in lines:
                window, found = _parse(line)
                if window != current:
                    yield current, answers
                    current, answers = window, {}
                answers |= found
            yield current, answers

    def close(self) -> None:
        """Close the file; it stays on the disk."""
        self._file.close()

    def _append(self, line: bytes) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Read what is finished and return where usable lines end; 0 if there are none."""
        if not self.path.is_file():
            return 0
        with open(self.path, "rb") as lines:
            header = lines.readline()
            if not header.endswith(b"\n"):  # cut off by a crash
                return 0
            if header != self._header:
                raise UserError(self._explain_difference(header))
            end = lines.tell()
            for line in lines:
                try:
                    window, found = _parse(line)
                except (ValueError, TypeError, KeyError):  # cut off by a crash
                    break
                if window != self.window:
                    self.window, self.answers = window, {}
                self.answers |= found
                self.count += len(found)
                end += len(line)
        return end

    def _explain_difference(self, header: bytes) -> str:
        mine, other = json.loads(self._header), _object_or_nothing(header)
        names = [name for name in mine if mine[name] != other.get(name)]
        return (
            f"{self.path} has unfinished answers, but not for the same {' and '.join(names)}; "
            "choose another --output, or delete this file to begin anew"
        )


def _object_or_nothing(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _parse(line: bytes) -> tuple[int, Answers]:
    if not line.endswith(b"\n"):
        raise ValueError("the line is not complete")
    content = json.loads(line)
    return content["window"], {
        row: RowAnswer(text, confidence, tuple(probabilities))
        for row, text, confidence, probabilities in content["rows"]
    }


def fingerprint(folders: Iterable[Path]) -> str:
    """Return a digest of what determines the answers of a model and its adapter.

    A folder with a manifest is represented by it, because the manifest has the digest of each
    file and is verified when a model is loaded. Other large files are represented by their size and
    time of change.
    """
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        manifest = folder / MANIFEST
        files: Sequence[Path] = [manifest] if manifest.is_file() else list_files(folder)
        for file in files:
            parts = file.relative_to(folder).parts
            if parts[-1] in _NOT_PART_OF_ANSWERS or parts[0] == _MERGED:
                continue
            status = file.stat()
            is_small = status.st_size <= _LARGEST_HASHED
            content = sha256_file(file) if is_small else f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{number} {'/'.join(parts)} {content}\n".encode())
    return digest.hexdigest()
