"""Plain text: one file, compressed or not, is one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from headway.data.files import ListedFile
from headway.data.formats.compression import open_binary
from headway.data.formats.source_file import Entry, SourceFile
from headway.data.pieces import stream_pieces
from headway.data.report import SourceReport


class TextFile(SourceFile):
    """A file that is one document; of any length, since only a piece of it is held."""

    def __init__(self, file: ListedFile) -> None:
        self.path, self.name, self.group = file.path, file.name, file.group

    def entries(self, report: SourceReport) -> Iterator[Entry]:
        """The one document."""
        yield Entry(position=0, number=0, group=self.group, prompt_bytes=0, pieces=self.pieces(0, 0))

    def pieces(self, position: int, num_bytes: int) -> Iterator[bytes]:
        """The whole file."""
        with open_binary(self.path) as file:
            yield from stream_pieces(file)

    def identity(self) -> tuple[object, ...]:
        """Size and time of the last change."""
        return file_identity(self.path)


def file_identity(path: Path) -> tuple[object, ...]:
    """Size and time of the last change of a file; its absence is an identity too."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns
