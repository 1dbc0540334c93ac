"""Texts of any length, cut into pieces of bounded size that decode on their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

# 1 MiB keeps what the tokenizers library holds per piece (alignments, strings) near 100 MB.
MAX_PIECE_BYTES = 1 << 20


class Readable(Protocol):
    """What `stream_pieces` needs of an open binary file."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end only."""


def split_into_pieces(data: bytes, *, max_bytes: int = MAX_PIECE_BYTES) -> Iterator[bytes]:
    r"""Cut one document into pieces of bounded size that decode on their own; their concatenation is the document.

    Cuts after the last newline of a piece, else after its last space, else before a character's first byte. Only
    documents above max_bytes are cut, and only there can BPE tokens differ from those of the whole text.

    >>> [*split_into_pieces(b"one\ntwo three", max_bytes=8)]
    [b'one\n', b'two ', b'three']
    """
    start = 0
    while len(data) - start > max_bytes:
        cut = _cut(data, start, max_bytes)
        yield data[start:cut]
        start = cut
    if start < len(data):
        yield data[start:]


def stream_pieces(file: Readable, *, max_bytes: int = MAX_PIECE_BYTES) -> Iterator[bytes]:
    """The pieces that `split_into_pieces` gives for the rest of a file, holding one of them at a time."""
    buffer = b""
    while True:
        while len(buffer) <= max_bytes:
            more = file.read(max_bytes + 1)
            if not more:
                break
            buffer += more
        if len(buffer) <= max_bytes:
            if buffer:
                yield buffer
            return
        cut = _cut(buffer, 0, max_bytes)
        yield buffer[:cut]
        buffer = buffer[cut:]


def _cut(data: bytes, start: int, max_bytes: int) -> int:
    """Where the piece from `start` ends; more than max_bytes follow there."""
    stop = start + max_bytes
    cut = data.rfind(b"\n", start, stop) + 1 or data.rfind(b" ", start, stop) + 1
    if not cut:
        cut = stop
        while cut > max(start + 1, stop - 3) and 0x80 <= data[cut] < 0xC0:
            cut -= 1
    return cut
