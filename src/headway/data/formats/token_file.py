"""Raw ids in .npy and .bin files: text encoded elsewhere, or any other modality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headway.data.document import TOKEN_DTYPE
from headway.data.files import ListedFile
from headway.data.formats.source_file import Entry, SourceFile
from headway.data.formats.text import file_identity
from headway.data.report import SourceReport
from headway.errors import DataError

_TOKENS_PER_PIECE = 1 << 18
_ITEM = np.dtype(TOKEN_DTYPE).itemsize


@dataclass(frozen=True)
class TokenRules:
    """What ids mean.

    Attributes:
        end_token_id: ends a document.
        vocabulary_size: every id is below it.
    """

    end_token_id: int
    vocabulary_size: int


class TokenFile(SourceFile):
    """Documents of a file of ids: the rows of a matrix, or what lies between the end tokens of a stream.

    Args:
        file: .npy says its own type, anything else is ids and nothing else.
        dtype: of a file that does not say its own.
        rules: the end token is not part of a document (the token cache writes it anew), all others are.
    """

    is_tokens = True

    def __init__(self, file: ListedFile, dtype: str | None, rules: TokenRules) -> None:
        self.path, self.name, self.dtype, self.rules = file.path, file.name, dtype, rules
        self._ids: npt.NDArray[Any] | None = None

    def entries(self, report: SourceReport) -> Iterator[Entry]:
        """The documents; none where the file is empty.

        Raises:
            DataError: no whole numbers of one or two dimensions, or an id outside the vocabulary.
        """
        try:
            ids = self._mapped()
        except OSError as error:
            report.unreadable.append((self.name, (error.strerror or str(error)).lower()))
            return
        for number, (start, stop) in enumerate(self._spans(ids), start=1):
            yield Entry(start, number, None, 0, self._pieces(start, stop))

    def pieces(self, position: int, num_bytes: int) -> Iterator[bytes]:
        """The ids of one document as little-endian uint32."""
        return self._pieces(position, position + num_bytes // _ITEM)

    def identity(self) -> tuple[object, ...]:
        """Size, time of the last change, and how the ids are read."""
        return *file_identity(self.path), self.dtype, self.rules.end_token_id

    def close(self) -> None:
        """Unmap the file."""
        self._ids = None

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        flat = self._mapped().reshape(-1)
        for begin in range(start, stop, _TOKENS_PER_PIECE):
            ids = flat[begin : min(begin + _TOKENS_PER_PIECE, stop)]
            lowest, highest = int(ids.min()), int(ids.max())
            if lowest < 0 or highest >= self.rules.vocabulary_size:
                raise DataError(
                    f"the ids of {self.name!r} must be in 0..{self.rules.vocabulary_size - 1}, the vocabulary of the "
                    f"tokenizer: got {lowest}..{highest}; check dtype, or choose the tokenizer they were made with "
                    f"(integers:{highest + 1} is one for ids of any kind)"
                )
            yield ids.astype(TOKEN_DTYPE).tobytes()

    def _spans(self, ids: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
        end = self.rules.end_token_id
        if ids.ndim == 2:
            rows, length = ids.shape
            for row in range(rows):
                # rows made for training often carry their end token already
                trimmed = length and int(ids[row, -1]) == end
                yield row * length, (row + 1) * length - bool(trimmed)
            return
        begin = 0
        for start in range(0, len(ids), _TOKENS_PER_PIECE):
            for place in np.flatnonzero(ids[start : start + _TOKENS_PER_PIECE] == end):
                yield begin, start + int(place)
                begin = start + int(place) + 1
        if begin < len(ids):
            yield begin, len(ids)

    def _mapped(self) -> npt.NDArray[Any]:
        if self._ids is None:
            self._ids = _map(self.path, self.name, self.dtype)
        return self._ids


def _map(path: Path, name: str, dtype: str | None) -> npt.NDArray[Any]:
    size = path.stat().st_size
    if path.suffix.lower() == ".npy":
        try:
            ids: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{name!r} is no .npy file of numbers ({error}); save it with numpy.save") from error
    elif dtype is None:
        raise DataError(
            f"{name!r} does not say how its ids are laid out; pass dtype, for example {path.name}::dtype=uint16"
        )
    elif size == 0:
        ids = np.zeros(0, dtype=dtype)
    elif size % np.dtype(dtype).itemsize:
        raise DataError(
            f"{name!r} has {size} bytes, which is no multiple of {np.dtype(dtype).itemsize}, the size of {dtype}; "
            f"check dtype"
        )
    else:
        ids = np.memmap(path, dtype=dtype, mode="r")
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise DataError(
            f"{name!r} must hold whole numbers in one or two dimensions: got {ids.dtype} of shape {ids.shape}; "
            f"save the ids as such"
        )
    return ids
