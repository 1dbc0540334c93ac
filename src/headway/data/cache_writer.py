"""Writes the files of a token cache piece by piece, and takes up what a killed writer left."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from headway.data.cache_format import (
    DOCUMENTS_FILE,
    FORMAT,
    METADATA_FILE,
    PROMPTS_FILE,
    TOKENS_FILE,
    VERSION,
    CacheMetadata,
    file_sha256,
)
from headway.data.collection import StoredDocument
from headway.data.document import Document, is_utf8
from headway.data.encoding import Piece
from headway.data.fingerprint import DataDigest

PROGRESS_FILE = "progress.json"
_OFFSETS_FILE, _PROMPTS_FILE = "offsets.raw", "prompts.raw"
_OFFSET_BYTES = 8
_READ_BYTES = 1 << 20

Sync = Callable[[BinaryIO], None]


@dataclass(frozen=True)
class Progress:
    """What is on disk of an unfinished cache: whole documents from the first one on.

    Attributes:
        tokenizer_fingerprint: of what encoded them.
        dtype: of the tokens.
        documents: so many.
        data_fingerprint: of exactly these documents.
        num_tokens: theirs.
        num_bytes: of their text.
        num_raw_documents: of them, without text.
        num_prompt_tokens: of them.
        num_prompt_bytes: of them.
        num_undecodable: of them.
    """

    tokenizer_fingerprint: str
    dtype: str
    documents: int = 0
    data_fingerprint: str = ""
    num_tokens: int = 0
    num_bytes: int = 0
    num_raw_documents: int = 0
    num_prompt_tokens: int = 0
    num_prompt_bytes: int = 0
    num_undecodable: int = 0


def read_progress(folder: Path, *, tokenizer_fingerprint: str, dtype: str) -> Progress:
    """What a killed writer left in a folder; nothing where it cannot be used for this tokenizer."""
    fresh = Progress(tokenizer_fingerprint, dtype)
    try:
        found = Progress(**json.loads((folder / PROGRESS_FILE).read_bytes()))
        complete = (
            found.tokenizer_fingerprint == tokenizer_fingerprint
            and found.dtype == dtype
            and (folder / TOKENS_FILE).stat().st_size >= found.num_tokens * np.dtype(dtype).itemsize
            and (folder / _OFFSETS_FILE).stat().st_size >= found.documents * _OFFSET_BYTES
            and (folder / _PROMPTS_FILE).stat().st_size >= found.documents * _OFFSET_BYTES
        )
    except (OSError, ValueError, TypeError):
        return fresh
    return found if complete else fresh


class CacheWriter:
    """Appends documents to the files of a cache.

    `meet` is called with each piece on its way to the encoder, `write` with its ids on their way back, in the same
    order.

    Args:
        folder: of the files.
        progress: what is in them already; the rest is cut off.
        digest: of the documents in them.
        eos_token_id: written after each document.
        replaces_undecodable: whether bytes that are not UTF-8 become U+FFFD.
        sync: brings a file to the disk.
    """

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        digest: DataDigest,
        *,
        eos_token_id: int,
        replaces_undecodable: bool,
        sync: Sync,
    ) -> None:
        self.folder, self.saved = folder, progress
        self._counts = asdict(progress)
        self._digest, self._sync = digest, sync
        self._replaces_undecodable = replaces_undecodable
        self._dtype = np.dtype(progress.dtype)
        self._eos = np.array([eos_token_id], dtype=self._dtype).tobytes()
        self._meeting = _Met()
        self._met: deque[_Met] = deque()
        self._prompt_tokens = 0
        self._offsets = _taken_up(folder / _OFFSETS_FILE, progress.documents)
        self._prompts = _taken_up(folder / _PROMPTS_FILE, progress.documents)
        self._sha256 = hashlib.sha256()
        self._file = (folder / TOKENS_FILE).open("r+b" if progress.documents else "w+b")
        self._file.truncate(progress.num_tokens * self._dtype.itemsize)
        while content := self._file.read(_READ_BYTES):
            self._sha256.update(content)

    def close(self) -> None:
        """Close the file of tokens."""
        self._file.close()

    def meet(self, document: Document, piece: Piece) -> None:
        """Count a piece before it is encoded."""
        met = self._meeting
        met.num_bytes += len(piece.data)
        if not isinstance(document, StoredDocument):
            met.sha256.update(piece.data)
        if self._replaces_undecodable and not piece.is_tokens and not is_utf8(piece.data):
            met.undecodable = True
        if piece.ends_document:
            met.document = document
            self._met.append(met)
            self._meeting = _Met()

    def write(self, ids: npt.NDArray[Any], piece: Piece) -> None:
        """Append the ids of the next piece, and an EOS where it ends its document."""
        content = ids.astype(self._dtype, copy=False).tobytes() + (self._eos if piece.ends_document else b"")
        self._file.write(content)
        self._sha256.update(content)
        self._counts["num_tokens"] += len(content) // self._dtype.itemsize
        if piece.is_prompt:
            self._prompt_tokens += len(ids)
        if piece.ends_document:
            self._end_document(self._met.popleft())

    def save_progress(self) -> None:
        """Bring to the disk all documents written so far, so that a later writer can go on from here."""
        self._sync(self._file)
        for name, column in ((_OFFSETS_FILE, self._offsets), (_PROMPTS_FILE, self._prompts)):
            with (self.folder / name).open("ab") as file:
                file.write(column[self.saved.documents :].tobytes())
                self._sync(file)
        self.saved = Progress(**self._counts | {"data_fingerprint": self._digest.hexdigest()})
        self._write_json(PROGRESS_FILE, asdict(self.saved))

    def finish(self, *, vocabulary_size: int, eos_token_id: int) -> CacheMetadata:
        """Write what belongs to the tokens, and leave nothing else in the folder."""
        self._sync(self._file)
        counts = self._counts
        offsets = np.concatenate([[0], np.frombuffer(self._offsets, dtype=np.int64)])
        self._write_array(DOCUMENTS_FILE, offsets)
        if counts["num_prompt_tokens"]:
            self._write_array(PROMPTS_FILE, np.frombuffer(self._prompts, dtype=np.int64))
        for name in (_OFFSETS_FILE, _PROMPTS_FILE, PROGRESS_FILE):
            (self.folder / name).unlink(missing_ok=True)
        metadata = CacheMetadata(
            format=FORMAT,
            version=VERSION,
            data_fingerprint=self._digest.hexdigest(),
            tokenizer_fingerprint=counts["tokenizer_fingerprint"],
            dtype=counts["dtype"],
            vocabulary_size=vocabulary_size,
            eos_token_id=eos_token_id,
            num_tokens=counts["num_tokens"],
            num_documents=counts["documents"],
            num_raw_documents=counts["num_raw_documents"],
            num_bytes=counts["num_bytes"],
            num_prompt_tokens=counts["num_prompt_tokens"],
            num_prompt_bytes=counts["num_prompt_bytes"],
            num_undecodable=counts["num_undecodable"],
            tokens_sha256=self._sha256.hexdigest(),
            documents_sha256=file_sha256(self.folder / DOCUMENTS_FILE),
            prompts_sha256=file_sha256(self.folder / PROMPTS_FILE) if counts["num_prompt_tokens"] else "",
        )
        self._write_json(METADATA_FILE, asdict(metadata))
        return metadata

    @property
    def num_documents(self) -> int:
        """Written so far."""
        return int(self._counts["documents"])

    @property
    def unsaved_bytes(self) -> int:
        """Bytes of tokens written since progress was saved."""
        return int(self._counts["num_tokens"] - self.saved.num_tokens) * self._dtype.itemsize

    def _end_document(self, met: _Met) -> None:
        document, counts = met.document, self._counts
        assert document is not None
        sha256 = document.sha256() if isinstance(document, StoredDocument) else met.sha256.digest()
        self._digest.add_parts(document, num_bytes=met.num_bytes, sha256=sha256)
        counts["documents"] += 1
        counts["num_bytes"] += 0 if document.is_tokens else met.num_bytes
        counts["num_raw_documents"] += int(document.is_tokens)
        counts["num_prompt_bytes"] += document.prompt_bytes
        counts["num_prompt_tokens"] += self._prompt_tokens
        counts["num_undecodable"] += int(met.undecodable)
        self._offsets.append(counts["num_tokens"])
        self._prompts.append(self._prompt_tokens)
        self._prompt_tokens = 0

    def _write_array(self, name: str, values: npt.NDArray[np.int64]) -> None:
        with (self.folder / name).open("wb") as file:
            np.save(file, values)
            self._sync(file)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        unfinished = self.folder / f"{name}.writing"
        with unfinished.open("wb") as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
            self._sync(file)
        unfinished.replace(self.folder / name)


@dataclass
class _Met:
    """A document on its way through the encoder."""

    document: Document | None = None
    num_bytes: int = 0
    undecodable: bool = False
    sha256: Any = field(default_factory=hashlib.sha256)


def _taken_up(path: Path, documents: int) -> array[int]:
    """The first items of a column that a killed writer left; the rest is cut off."""
    column = array("q")
    with path.open("r+b" if documents else "w+b") as file:
        file.truncate(documents * _OFFSET_BYTES)
        column.frombytes(file.read())
    return column
