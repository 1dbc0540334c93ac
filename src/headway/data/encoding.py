"""From the bytes of documents to ids, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from headway.data.document import TOKEN_DTYPE, Document
from headway.data.pieces import MAX_PIECE_BYTES, split_into_pieces
from headway.data.text_encoder import TextEncoder
from headway.data.tokenizers import encode_bytes, is_byte_tokenizer

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
        self.definition: str | None = None
        self._fast: TextEncoder | None = None
        if not self.is_bytes and getattr(tokenizer, "is_fast", False):
            # the copy spares the tokenizer's own state; calling it is also a third faster than its Python wrapper
            self.definition = str(tokenizer.backend_tokenizer.to_str())
            self._fast = TextEncoder(self.definition)

    def encode(self, pieces: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        """Ids of each piece; all pieces of a call are encoded in parallel where the tokenizer can."""
        if self.is_bytes:
            return [encode_bytes(piece) for piece in pieces]
        if self._fast is not None:
            return self._fast.encode(pieces)
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        rows = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [np.array(row, dtype=np.int64) for row in rows]

    def encode_document(self, data: bytes) -> npt.NDArray[Any]:
        """Ids of one whole document."""
        rows = self.encode([*split_into_pieces(data)])
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


class Piece(NamedTuple):
    """Part of a document.

    Attributes:
        data: text, or ids as `TOKEN_DTYPE`.
        ends_document: whether the document ends with it.
        is_prompt: whether it is read but not learned.
        is_tokens: whether it is ids already.
    """

    data: bytes
    ends_document: bool
    is_prompt: bool = False
    is_tokens: bool = False

    def tokens(self) -> npt.NDArray[Any]:
        """The ids of a piece that is ids already."""
        return np.frombuffer(self.data, dtype=TOKEN_DTYPE)


def document_pieces(document: Document) -> Iterator[Piece]:
    """The pieces of a document, at least one; none reaches from the prompt into the completion."""
    parts = [(document.pieces(), False)]
    if document.prompt_bytes:
        data = document.data
        prompt, completion = data[: document.prompt_bytes], data[document.prompt_bytes :]
        parts = [(split_into_pieces(prompt), True), (split_into_pieces(completion), False)]
    last = None
    for pieces, is_prompt in parts:
        for content in pieces:
            if last is not None:
                yield last
            last = Piece(content, ends_document=False, is_prompt=is_prompt, is_tokens=document.is_tokens)
    yield (last or Piece(b"", ends_document=True, is_tokens=document.is_tokens))._replace(ends_document=True)


def piece_batches(
    documents: Iterable[Document], *, watch: Callable[[Document, Piece], None] | None = None
) -> Iterator[list[Piece]]:
    """The pieces of documents, gathered to about 1 MiB so that tokenizers can work in parallel.

    Every document has at least one piece, also one without text.

    Args:
        documents: one is read at a time.
        watch: called with each piece on its way.
    """
    batch: list[Piece] = []
    size = 0
    for document in documents:
        for piece in document_pieces(document):
            if watch is not None:
                watch(document, piece)
            batch.append(piece)
            size += len(piece.data)
            if size >= MAX_PIECE_BYTES or len(batch) >= _PIECES_PER_BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
