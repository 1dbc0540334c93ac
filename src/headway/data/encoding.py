"""From the bytes of documents to ids, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from headway.data.sources import Document
from headway.data.tokenizers import MAX_PIECE_BYTES, encode_bytes, is_byte_tokenizer, split_into_pieces

_PIECES_PER_BATCH = 1024


class DocumentEncoder:
    """Turns pieces of documents into ids: no special tokens are added, and none are recognised in the text.

    Bytes go straight to ids for the byte tokenizer. For every other tokenizer they are decoded as UTF-8, undecodable
    bytes becoming U+FFFD.

    Args:
        tokenizer: left as it is; its backend is copied.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.is_bytes = is_byte_tokenizer(tokenizer)
        self._backend: Any = None
        if not self.is_bytes and getattr(tokenizer, "is_fast", False):
            # the copy spares the tokenizer's own state; calling it is also a third faster than its Python wrapper
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def encode(self, pieces: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        """Ids of each piece; all pieces of a call are encoded in parallel where the tokenizer can."""
        if self.is_bytes:
            return [encode_bytes(piece) for piece in pieces]
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        rows = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [np.array(row, dtype=np.int64) for row in rows]

    def encode_document(self, data: bytes) -> npt.NDArray[Any]:
        """Ids of one whole document."""
        rows = self.encode([*split_into_pieces(data)])
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


class Piece(NamedTuple):
    """Part of a document, and whether the document ends with it."""

    data: bytes
    ends_document: bool


def piece_batches(documents: Iterable[Document]) -> Iterator[list[Piece]]:
    """The pieces of documents, gathered to about 1 MiB so that tokenizers can work in parallel.

    Every document has at least one piece, also one without text.
    """
    batch: list[Piece] = []
    size = 0
    for document in documents:
        remaining = len(document.data)
        for data in split_into_pieces(document.data) if document.data else (b"",):
            remaining -= len(data)
            batch.append(Piece(data, ends_document=remaining == 0))
            size += len(data)
            if size >= MAX_PIECE_BYTES or len(batch) >= _PIECES_PER_BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
