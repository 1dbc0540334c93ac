"""Parquet: each row is a record; only the columns asked for are read, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headway.data.files import ListedFile
from headway.data.formats.optional import optional_package
from headway.data.formats.records import RecordReader
from headway.data.formats.source_file import Entry, SourceFile
from headway.data.formats.text import file_identity
from headway.data.pieces import split_into_pieces
from headway.data.report import SourceReport
from headway.data.source_spec import SourceSpec
from headway.errors import DataError

_ROWS_PER_BATCH = 256


class ParquetFile(SourceFile):
    """Documents of the rows of a Parquet file."""

    def __init__(self, file: ListedFile, spec: SourceSpec) -> None:
        self.path, self.name, self.spec = file.path, file.name, spec
        self._rows: Iterator[tuple[int, Mapping[str, Any]]] | None = None
        self._next = 0

    def entries(self, report: SourceReport) -> Iterator[Entry]:
        """One document per usable row.

        Raises:
            DataError: there is no such column; those that exist are named. Or pyarrow is not installed.
        """
        reader = RecordReader(self.spec, repr(self.name))
        row = -1
        arrow = _arrow()
        try:
            for row, record in self._records(arrow, 0):
                text = reader.read(record, report)
                if text is not None:
                    yield Entry(row, row + 1, text.group, text.prompt_bytes, split_into_pieces(text.data))
        except (OSError, arrow.lib.ArrowException) as error:
            report.unreadable.append((self.name, f"is damaged ({' '.join(str(error).split())}), after {row + 1} rows"))
        reader.finish()

    def pieces(self, position: int, num_bytes: int) -> Iterator[bytes]:
        """The text of one row."""
        if self._rows is None or position < self._next:
            self._rows, self._next = self._records(_arrow(), position), position
        for row, record in self._rows:
            self._next = row + 1
            if row == position:
                text = RecordReader(self.spec, repr(self.name)).read(record)
                if text is not None:
                    yield from split_into_pieces(text.data)
                    return
        raise DataError(f"{self.name!r} changed while it was read; start again")

    def identity(self) -> tuple[object, ...]:
        """Size and time of the last change."""
        return file_identity(self.path)

    def close(self) -> None:
        """Let go of the file."""
        self._rows = None

    def _records(self, arrow: Any, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(row, record) from a row on; earlier row groups are not read."""
        with arrow.parquet.ParquetFile(self.path) as file:
            columns = [name for name in self.spec.needed_fields if _has_column(file, name)]
            if not columns:
                # nothing of what was asked for is there: the reader of records tells which columns are
                yield from enumerate([dict.fromkeys(file.schema_arrow.names)] * bool(file.metadata.num_rows))
                return
            groups = range(file.metadata.num_row_groups)
            first = 0
            for group in groups:
                rows = file.metadata.row_group(group).num_rows
                if first + rows > start:
                    break
                first += rows
            else:
                return
            row = first
            for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=list(groups)[group:], columns=columns):
                if row + len(batch) > start:
                    for offset, record in enumerate(batch.to_pylist()):
                        if row + offset >= start:
                            yield row + offset, record
                row += len(batch)


def _has_column(file: Any, name: str) -> bool:
    names = file.schema_arrow.names
    return name in names or name.split(".")[0] in names


def _arrow() -> Any:
    arrow = optional_package("pyarrow", needed_for="reading Parquet files")
    optional_package("pyarrow.parquet", needed_for="reading Parquet files")
    return arrow
