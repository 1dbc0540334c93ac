"""JSON lines: one object a line, compressed or not; each is a document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from headway.data.files import ListedFile
from headway.data.formats.compression import DAMAGED, damage, open_binary
from headway.data.formats.records import RecordReader
from headway.data.formats.source_file import Entry, SourceFile
from headway.data.formats.text import file_identity
from headway.data.pieces import split_into_pieces
from headway.data.report import SourceReport
from headway.data.source_spec import SourceSpec
from headway.errors import DataError

MAX_RECORD_BYTES = 1 << 28
"""Longer lines are left out: a record is held whole, several times over, while it is read."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 20


class JsonLinesFile(SourceFile):
    """Documents of a file of JSON objects, one a line."""

    def __init__(self, file: ListedFile, spec: SourceSpec) -> None:
        self.path, self.name, self.spec = file.path, file.name, spec
        self._file: IO[bytes] | None = None
        self._at = 0

    def entries(self, report: SourceReport) -> Iterator[Entry]:
        """One document per usable line; blank lines are nothing.

        Raises:
            DataError: the file cannot be opened, or no record has the field.
        """
        reader = RecordReader(self.spec, repr(self.name))
        number = 0
        try:
            with open_binary(self.path) as file:
                for number, position, line in _lines(file):
                    if line is None:
                        report.too_long += 1
                        continue
                    record = parse_line(line)
                    if record is None:
                        report.broken += bool(line.strip())
                        continue
                    text = reader.read(record, report)
                    if text is not None:
                        yield Entry(position, number, text.group, text.prompt_bytes, split_into_pieces(text.data))
        except (OSError, *DAMAGED) as error:
            report.unreadable.append((self.name, f"{damage(error)}, after {number} lines"))
        reader.finish()

    def pieces(self, position: int, num_bytes: int) -> Iterator[bytes]:
        """The text of the line that begins at a byte of the uncompressed file."""
        file = self._open_at(position)
        line = file.readline(MAX_RECORD_BYTES + 1)
        self._at = position + len(line)
        record = parse_line(line)
        text = None if record is None else RecordReader(self.spec, repr(self.name)).read(record)
        if text is None:
            raise DataError(f"{self.name!r} changed while it was read; start again")
        yield from split_into_pieces(text.data)

    def identity(self) -> tuple[object, ...]:
        """Size and time of the last change."""
        return file_identity(self.path)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_at(self, position: int) -> IO[bytes]:
        if self._file is not None and position < self._at:
            # going back in a compressed file means beginning anew
            self.close()
        if self._file is None:
            self._file = open_binary(self.path)
            self._at = 0
        while self._at < position:
            skipped = len(self._file.read(min(_SKIP_BYTES, position - self._at)))
            if not skipped:
                raise DataError(f"{self.name!r} became shorter while it was read; start again")
            self._at += skipped
        return self._file


def parse_line(line: bytes) -> Mapping[str, Any] | None:
    """The object of a line; None where it is something else, or no JSON at all.

    Bytes that are not UTF-8 pass through unchanged, as `surrogateescape` has them.
    """
    try:
        record = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _lines(file: IO[bytes]) -> Iterator[tuple[int, int, bytes | None]]:
    """(number from 1, position, line) of each line; None instead of a line that is too long."""
    number = position = 0
    while True:
        line = file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        number += 1
        begin = position
        position += len(line)
        if len(line) <= MAX_RECORD_BYTES:
            yield number, begin, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_SKIP_BYTES)
            position += len(line)
        yield number, begin, None
