"""Read the rows to answer, with all of their columns, in any format that training reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptj8.dataset.readers.columnar import COLUMNAR
from gptj8.dataset.readers.formats import check_file, column_names
from gptj8.dataset.readers.options import ReadOptions
from gptj8.dataset.readers.parsers import is_plain, is_table, parse_file
from gptj8.dataset.readers.rows import Row
from gptj8.dataset.readers.text_files import suffix_of
from gptj8.serving.task import TunedTask


@dataclass(frozen=True)
class InputFile:
    """A file of rows.

    Attributes:
        path: the file.
        names: its columns in order; None if only its rows have them, as in JSON.
        options: how it is read.
    """

    path: Path
    names: tuple[str, ...] | None
    options: ReadOptions

    @classmethod
    def open(cls, path: Path, task: TunedTask) -> InputFile:
        """Look at a file and its columns.

        Raises:
            UserError: if it cannot be read, repeats the name of a column, or lacks one that the
                prompt needs.
        """
        shape = task.shape
        columns = {field: name for field, name in shape.columns.items() if field != shape.answer}
        options = ReadOptions(columns, shape.optional & columns.keys())
        check_file(path, options)
        if is_plain(path, options):
            return cls(path, (columns["text"],), options)
        if suffix_of(path) not in COLUMNAR and not is_table(path, options):
            return cls(path, None, options)
        names = tuple(column_names(path, options))
        every: dict[str, str] = {}
        for name in names:
            fields = [field for field, column in columns.items() if column == name]
            every |= dict.fromkeys(fields or [f"\0{name}"], name)
        optional = options.optional | (every.keys() - columns.keys())
        options = replace(options, columns=every | columns, optional=optional)
        column_names(path, options)  # now any repeated name is refused, because all are kept
        return cls(path, names, options)

    def rows(self, advance: Callable[[int], object] = lambda size: None) -> Iterator[Row]:
        """Yield the rows in order; see `gptj8.dataset.readers.parsers.parse_file`.

        A few thousand rows are in memory at a time, except of a JSON array.
        """
        return parse_file(self.path, self.options, advance)
