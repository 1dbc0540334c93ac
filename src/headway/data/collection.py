"""Many documents that stay on disk: what is held of each is where it lies, its length and its digest.

About 65 bytes are held per document, so that ten million of them, of any length, fit in the memory of a laptop.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from headway.data.document import Document
from headway.data.formats.compression import DAMAGED, damage
from headway.data.formats.source_file import SourceFile
from headway.data.report import SourceReport
from headway.errors import DataError

_DIGEST_BYTES = 32
_BY_CONTENT = -1
# records of a file have no folders that could keep relatives together; equal ones always share their digest
_GROUP_DIGITS = 4


@dataclass(frozen=True, eq=False)
class _Table:
    """The columns behind a collection and all its parts; item i of each belongs to document i."""

    files: tuple[SourceFile, ...]
    file_starts: list[int]
    file_sources: list[int]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    positions: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64]
    group_ids: npt.NDArray[np.int64]
    digests: bytes
    opened: list[int]

    def file_of(self, index: int) -> int:
        return bisect_right(self.file_starts, index) - 1

    def digest(self, index: int) -> bytes:
        return self.digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]

    def name(self, index: int) -> str:
        file = self.files[self.file_of(index)]
        number = int(self.numbers[index])
        return f"{file.name}:{number}" if number else file.name

    def group(self, index: int) -> str:
        group = int(self.group_ids[index])
        if group != _BY_CONTENT:
            return self.groups[group]
        label = self.labels[self.file_sources[self.file_of(index)]]
        return f"{label}#{self.digest(index).hex()[:_GROUP_DIGITS]}"

    def pieces(self, index: int) -> Iterator[bytes]:
        number = self.file_of(index)
        file = self.files[number]
        if self.opened and self.opened[0] != number:
            self.files[self.opened[0]].close()
        self.opened[:] = [number]
        seen = hashlib.sha256()
        try:
            for piece in file.pieces(int(self.positions[index]), int(self.lengths[index])):
                seen.update(piece)
                yield piece
        except (OSError, *DAMAGED) as error:
            raise DataError(
                f"{self.name(index)!r} cannot be read any more ({damage(error)}); restore it and start again"
            ) from error
        if seen.digest() != self.digest(index):
            raise DataError(f"{self.name(index)!r} changed while it was read; leave it alone and start again")


class StoredDocument(Document):
    """A document of a collection; its content is read from disk at every access, and checked."""

    __slots__ = ("_index", "_table")

    def __init__(self, table: _Table, index: int) -> None:
        self._table, self._index = table, index
        self.prompt_bytes = int(table.prompts[index])
        self.is_tokens = table.files[table.file_of(index)].is_tokens

    @property
    def name(self) -> str:  # type: ignore[override]
        """File and number of the record."""
        return self._table.name(self._index)

    @property
    def group(self) -> str:  # type: ignore[override]
        """What a split does not tear apart."""
        return self._table.group(self._index)

    @property
    def data(self) -> bytes:
        """The whole content, read from disk."""
        return b"".join(self.pieces())

    @property
    def num_bytes(self) -> int:
        """Length of the content; nothing is read."""
        return int(self._table.lengths[self._index])

    def pieces(self) -> Iterator[bytes]:
        """The content from disk, at most 1 MiB at a time.

        Raises:
            DataError: it cannot be read any more, or changed.
        """
        return self._table.pieces(self._index)

    def sha256(self) -> bytes:
        """Digest of the content; nothing is read."""
        return self._table.digest(self._index)


class Collection(Sequence[Document]):
    """Documents on disk in a fixed order. Reading them in order is cheap, also from compressed files.

    Only one file is open at a time. Not for several threads at once.
    """

    def __init__(self, table: _Table, indices: npt.NDArray[np.int64]) -> None:
        self._table, self._indices = table, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Collection: ...
    def __getitem__(self, index: int | slice) -> Document | Collection:
        if isinstance(index, slice):
            return Collection(self._table, self._indices[index])
        return StoredDocument(self._table, int(self._indices[index]))

    def __iter__(self) -> Iterator[Document]:
        for index in self._indices:
            yield StoredDocument(self._table, int(index))

    @property
    def num_bytes(self) -> int:
        """Of all documents together."""
        return int(self._table.lengths[self._indices].sum())

    def take(self, keep: Sequence[bool] | npt.NDArray[np.bool_]) -> Collection:
        """The documents for which `keep` is true, in the same order; nothing is read."""
        return Collection(self._table, self._indices[np.asarray(keep, dtype=bool)])

    def of_source(self, number: int) -> Collection:
        """The documents of one source, counted from 0 in the order in which sources were added."""
        starts = np.array(self._table.file_starts[1:])
        sources = np.array(self._table.file_sources, dtype=np.int64)
        return self.take(sources[np.searchsorted(starts, self._indices, side="right")] == number)

    def close(self) -> None:
        """Close what reading has left open; reading on opens it again."""
        for file in self._table.files:
            file.close()


class CollectionBuilder:
    """Goes through files once and remembers where their documents are."""

    def __init__(self) -> None:
        self._files: list[SourceFile] = []
        self._sources: list[int] = []
        self._starts = [0]
        self._labels: list[str] = []
        self._groups: dict[str, int] = {}
        self._columns = {name: array("q") for name in ("positions", "lengths", "numbers", "prompts", "group_ids")}
        self._digests = bytearray()

    def add_source(self, label: str) -> None:
        """Begin the next source.

        Args:
            label: told apart from those of the other sources.
        """
        self._labels.append(label)

    def add_file(self, file: SourceFile, report: SourceReport, *, at_most: int | None = None) -> None:
        """Read a file of the source begun last, from its start to its end.

        Args:
            file: its documents come after those of the files before.
            report: counts what it gives and what is left out.
            at_most: stop after so many documents.

        Raises:
            DataError: it is not in the format that it was asked to be.
        """
        added = 0
        for position, number, group, prompt_bytes, pieces in file.entries(report):
            digest, num_bytes = hashlib.sha256(), 0
            try:
                for piece in report.watch(pieces, is_text=not file.is_tokens):
                    digest.update(piece)
                    num_bytes += len(piece)
            except (OSError, *DAMAGED) as error:
                report.unreadable.append((file.name, damage(error)))
                continue
            if num_bytes:
                group_id = _BY_CONTENT if group is None else self._groups.setdefault(group, len(self._groups))
                row: dict[str, Any] = {
                    "positions": position,
                    "lengths": num_bytes,
                    "numbers": number,
                    "prompts": prompt_bytes,
                    "group_ids": group_id,
                }
                for name, value in row.items():
                    self._columns[name].append(value)
                self._digests += digest.digest()
                added += 1
                if added == at_most:
                    break
        file.close()
        self._files.append(file)
        self._sources.append(len(self._labels) - 1)
        self._starts.append(len(self._columns["positions"]))

    def finish(self) -> Collection:
        """All documents met."""
        columns = {name: np.frombuffer(column, dtype=np.int64) for name, column in self._columns.items()}
        table = _Table(
            files=tuple(self._files),
            file_starts=self._starts,
            file_sources=self._sources,
            labels=tuple(self._labels),
            groups=tuple(self._groups),
            digests=bytes(self._digests),
            opened=[],
            **columns,
        )
        return Collection(table, np.arange(len(columns["positions"])))
