"""`Document`: one text to train on, in memory or on disk, read whole or piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from headway.data.pieces import MAX_PIECE_BYTES, split_into_pieces

TOKEN_DTYPE = "<u4"
"""How the ids of a document that is tokens already are laid out in its `data`."""


class Document:
    """One text (or one row of ids). Equal when name, group and content are.

    Documents that come from files keep their content there and read it anew whenever it is asked for
    (`headway.data.collection`); this class is the one whose content is in memory.

    Args:
        name: unique, relative to its source, with forward slashes.
        group: what must not be torn apart by a split: the top-level folder, package or module.
        data: the raw bytes.
        prompt_bytes: how many of the first bytes are a prompt: read by the model, but no target of the loss.
        is_tokens: whether `data` is ids, little-endian uint32, instead of text.
    """

    __slots__ = ("_data", "group", "is_tokens", "name", "prompt_bytes")

    def __init__(self, name: str, group: str, data: bytes, *, prompt_bytes: int = 0, is_tokens: bool = False) -> None:
        self.name = name
        self.group = group
        self.prompt_bytes = prompt_bytes
        self.is_tokens = is_tokens
        self._data = data

    @property
    def data(self) -> bytes:
        """The whole content; of a document on disk it is read at every access."""
        return self._data

    @property
    def num_bytes(self) -> int:
        """Length of the content, known without reading it."""
        return len(self._data)

    def pieces(self) -> Iterator[bytes]:
        """The content in pieces of at most 1 MiB, none where it is empty: text as `split_into_pieces` cuts it."""
        if self.is_tokens:
            data = self.data
            return (data[start : start + MAX_PIECE_BYTES] for start in range(0, len(data), MAX_PIECE_BYTES))
        return split_into_pieces(self.data)

    def sha256(self) -> bytes:
        """Digest of the content (32 bytes)."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Document):
            return NotImplemented
        return (self.name, self.group, self.prompt_bytes, self.is_tokens, self.data) == (
            other.name,
            other.group,
            other.prompt_bytes,
            other.is_tokens,
            other.data,
        )

    def __hash__(self) -> int:
        return hash((self.name, self.group))

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {self.group!r}, {self.num_bytes} bytes)"


def is_utf8(data: bytes) -> bool:
    """Whether the bytes decode as UTF-8 without loss."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
