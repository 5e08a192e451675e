"""Open text files: compressions, encodings and line ends."""

from __future__ import annotations

import codecs
import functools
import io
import lzma
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import one_line

TEXT_SUFFIXES = (".txt", "")
"""Plain text, or a table if columns are wanted; a file without a suffix is text."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}

_MULTIBYTE = re.compile("[\x80-\ud7ff\ue000-\U0010ffff]")
_NOT_WINDOWS_1252 = b"\x81\x8d\x8f\x90\x9d"
_HIGH = bytes(range(0x80, 0x100))
_HIGH_RUN = re.compile(rb"[\x80-\xff]{2,}")
_MOST_IN_RUNS = 0.4  # accented letters rarely follow each other in languages with Latin letters
_CHUNK = 1 << 20


class TextLayout(NamedTuple):
    """How a text file is encoded.

    Attributes:
        encoding: the name of a codec.
        newline: as for `open`: line feeds end lines, or also carriage returns, if most lines end
            with those (old Macs). Otherwise, a carriage return inside a line is part of the text.
    """

    encoding: str
    newline: str


def suffix_of(path: Path) -> str:
    """Return the suffix of the format in lower case: `.jsonl` for `train.JSONL.gz`."""
    stem, suffix = os.path.splitext(path.name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


@contextmanager
def open_binary(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the decompressed content as a stream, and the raw file for tracking progress."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    with open(path, "rb") as raw:
        if compression is None:
            yield raw, raw
        elif compression == "xz":
            with lzma.open(raw) as stream:
                yield stream, raw  # type: ignore[misc]
        else:
            source = pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
            with io.BufferedReader(source) as stream:
                yield stream, raw  # type: ignore[misc]


@contextmanager
def open_text(
    path: Path, encoding: str = "auto", newline: str | None = None
) -> Iterator[tuple[io.TextIOWrapper, BinaryIO]]:
    """Yield a text stream that keeps line ends, and the raw file for tracking progress.

    Bytes that the encoding does not have become surrogates (PEP 383).

    Args:
        path: the file.
        encoding: see `text_layout`.
        newline: as for `open`; None finds out what ends lines.
    """
    layout = text_layout(path, encoding)
    with open_binary(path) as (stream, raw):
        text = io.TextIOWrapper(
            stream,
            encoding=layout.encoding,
            errors="surrogateescape",
            newline=layout.newline if newline is None else newline,
        )
        try:
            yield text, raw
        finally:
            text.detach()  # the stream is closed by `open_binary`


def text_layout(path: Path, encoding: str = "auto") -> TextLayout:
    """Return the encoding and the line ends of a text file.

    Args:
        path: the file.
        encoding: a codec, or `auto`: UTF-8, or Windows-1252, which includes Latin-1. A file is
            Windows-1252 if it has bytes that are not UTF-8, no character of several bytes that is,
            and few others that follow each other, unlike in encodings of other scripts. Otherwise,
            parts of the file have different encodings, or one that is not known, and it is read as
            UTF-8.

    Raises:
        UserError: if the file is UTF-16 and `encoding` is `auto`.
    """
    status = path.stat()
    return _text_layout(path, status.st_size, status.st_mtime_ns, encoding)


def encoding_of(path: Path) -> str:
    """Return the encoding that `auto` finds; see `text_layout`."""
    return text_layout(path).encoding


@functools.lru_cache(maxsize=1 << 16)
def _text_layout(path: Path, size: int, changed: int, encoding: str) -> TextLayout:
    with open_binary(path) as (stream, _):
        chunk = stream.read(_CHUNK)
        newline = "\n"
        if b"\r" in chunk and _returns_end_lines(chunk):
            newline = ""
        if encoding != "auto":
            is_utf8 = codecs.lookup(encoding).name == "utf-8"
            return TextLayout("utf-8-sig" if is_utf8 else encoding, newline)
        if chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or chunk[:2].count(0) == 1:
            raise UserError(f"{path} is UTF-16; save it as UTF-8")
        if len(chunk) < _CHUNK:  # a small file, of which there may be many
            with suppress(UnicodeDecodeError):
                chunk.decode()
                return TextLayout("utf-8-sig", newline)
        return TextLayout(_find_encoding(stream, chunk), newline)


def _returns_end_lines(chunk: bytes) -> bool:
    """Return whether carriage returns end lines: most of them, or the first and many others."""
    returns, feeds = chunk.count(b"\r") - chunk.count(b"\r\n"), chunk.count(b"\n")
    is_first = re.match(rb"[^\r\n]*\r(?!\n)", chunk) is not None
    return returns > feeds or (is_first and returns * 20 > feeds)


def _find_encoding(stream: BinaryIO, chunk: bytes) -> str:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    has_others = False
    in_runs = high = 0
    while chunk:
        if not chunk.isascii() or decoder.getstate()[0]:
            text = decoder.decode(chunk)
            if _MULTIBYTE.search(text):
                return "utf-8-sig"
            has_others = has_others or is_undecodable(text)
            high += len(chunk) - len(chunk.translate(None, _HIGH))
            in_runs += sum(map(len, _HIGH_RUN.findall(chunk)))
            if any(byte in chunk for byte in _NOT_WINDOWS_1252):
                return "utf-8-sig"
        chunk = stream.read(_CHUNK)
    has_others = has_others or is_undecodable(decoder.decode(b"", final=True))
    return "cp1252" if has_others and in_runs <= _MOST_IN_RUNS * high else "utf-8-sig"


@contextmanager
def reading(path: Path, encoding: str, what: str = "decompressed") -> Iterator[None]:
    """Convert the errors of damaged files.

    Args:
        path: the file.
        encoding: what `data.encoding` says.
        what: what cannot be done with a damaged file.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        yield
    except (EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be decompressed: {one_line(error)}") from None
    except UnicodeError as error:
        reason = one_line(error)
        raise UserError(f"{path} cannot be read in data.encoding = {encoding}: {reason}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} cannot be {what}: {one_line(error)}") from None


def is_undecodable(text: str) -> bool:
    """Return whether a text has surrogates that stand for bytes that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
