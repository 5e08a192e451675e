"""Scan files: in two local threads, or on the workers of a Dask cluster.

Locally, reading overlaps with tokenizing, which is in Rust. Alternative considered for clusters:
pandera's Dask backend; it was rejected because it stops at the first partition that fails, but the
report needs the failures of all partitions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gptj8.dataset.readers.columnar import BATCH_ROWS
from gptj8.dataset.readers.formats import read_batches
from gptj8.dataset.readers.rows import EmptyFileError
from gptj8.dataset.validation.parallel import ordered_map
from gptj8.dataset.validation.scan import ScannedBatch, Scanner
from gptj8.runtime.errors import UserError
from gptj8.runtime.messages import counted, one_line

_Errors = list[tuple[Path, UserError]]
_TASK_BYTES = 1 << 24


def scan_files(
    scanner: Scanner,
    files: Mapping[str, Sequence[Path]],
    engine: str,
    advance: Callable[[int], object],
    empty: dict[Path, str],
) -> Iterator[ScannedBatch]:
    """Scan files in order.

    Args:
        scanner: reads and scans each batch.
        files: the files of each split.
        engine: `local` or `dask`.
        advance: called with the bytes read since the last call.
        empty: filled with the files without rows and their error messages.

    Raises:
        UserError: one line per reason why files cannot be read.
    """
    errors: _Errors = []
    scan = _scan_on_dask if engine == "dask" else _scan_locally
    yield from scan(scanner, files, advance, errors)
    for path, error in errors:
        if isinstance(error, EmptyFileError):
            empty[path] = str(error)
    errors = [(path, error) for path, error in errors if path not in empty]
    if errors:
        raise UserError(_in_lines(errors))


def _in_lines(errors: _Errors) -> str:
    """Return a line for each reason, with the first file and the number of others."""
    files_of: dict[str, list[Path]] = {}
    reasons: dict[str, str] = {}
    for path, error in errors:
        for line in str(error).splitlines():
            reason = line.removeprefix(path.as_posix())
            key = reason.partition("; its columns: ")[0]  # which differ between plain texts
            files_of.setdefault(key, []).append(path)
            reasons.setdefault(key, reason)
    lines = []
    for key, files in files_of.items():
        reason = reasons[key]
        more = counted(len(files) - 1, "more file")
        also = f" (and {more}, such as {files[1]})" if len(files) > 1 else ""
        lines.append(f"{files[0].as_posix()}{reason}{also}")
    return "\n".join(lines)


def _scan_locally(
    scanner: Scanner,
    files: Mapping[str, Sequence[Path]],
    advance: Callable[[int], object],
    errors: _Errors,
) -> Iterator[ScannedBatch]:
    def batches() -> Iterator[pd.DataFrame]:
        for paths in files.values():
            yield from read_batches(paths, scanner.options, advance, errors)

    return ordered_map(scanner.scan, batches())


def _scan_on_dask(
    scanner: Scanner,
    files: Mapping[str, Sequence[Path]],
    advance: Callable[[int], object],
    errors: _Errors,
) -> Iterator[ScannedBatch]:
    """Scan files on a Dask cluster, one task per file; small files share a task.

    The cluster is the one in Dask's configuration (DASK_SCHEDULER_ADDRESS), or a local one.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError("data.engine = dask needs Dask: pip install 'gptj8[dask]'") from None
    try:
        connected = Client()
    except OSError as error:
        raise UserError(f"data.engine = dask: {one_line(error)}; is the cluster running?") from None
    with connected as client:
        max_started = 2 * max(1, len(client.nthreads()))
        started: deque[tuple[list[Path], Any]] = deque()
        remaining = deque(part for paths in files.values() for part in _in_tasks(paths))
        shared = client.scatter(scanner, broadcast=True)
        while remaining or started:
            while remaining and len(started) < max_started:
                part = remaining.popleft()
                started.append((part, client.submit(_scan_part, shared, part, pure=False)))
            part, future = started.popleft()
            batches, failures = future.result()
            errors += failures
            advance(sum(file.stat().st_size for file in part))
            yield from batches


def _in_tasks(files: Sequence[Path]) -> Iterator[list[Path]]:
    part: list[Path] = []
    size = 0
    for file in files:
        if part and (size + file.stat().st_size > _TASK_BYTES or len(part) == BATCH_ROWS):
            yield part
            part, size = [], 0
        part.append(file)
        size += file.stat().st_size
    if part:
        yield part


def _scan_part(scanner: Scanner, files: list[Path]) -> tuple[list[ScannedBatch], _Errors]:
    errors: _Errors = []
    rows = read_batches(files, scanner.options, errors=errors)
    return [scanner.scan(batch) for batch in rows], errors
