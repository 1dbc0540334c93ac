"""Tokens on disk: a memory-mapped stream of ids with the offsets of its documents.

    <directory>/tokens.bin       little-endian uint16, uint32 where the vocabulary needs it; an EOS ends each document
    <directory>/documents.npy    int64 [documents + 1]: where each document starts, and the number of tokens
    <directory>/metadata.json    versioned: fingerprints of text and tokenizer, counts, checksums of the other two

A cache is built in a folder beside its place and moved there whole. It is reused when both fingerprints agree and
replaced only when asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from headway.data.encoding import DocumentEncoder, Piece, piece_batches
from headway.data.fingerprint import DataDigest, data_fingerprint, tokenizer_fingerprint
from headway.data.sources import Document, is_utf8
from headway.data.tokenizers import vocabulary_size
from headway.errors import DataError

FORMAT = "headway-token-cache"
VERSION = 1
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.npy"
METADATA_FILE = "metadata.json"
_FILES = frozenset({TOKENS_FILE, DOCUMENTS_FILE, METADATA_FILE})


@dataclass(frozen=True)
class CacheMetadata:
    """What `metadata.json` says.

    Attributes:
        format: "headway-token-cache".
        version: of the layout.
        data_fingerprint: SHA-256 over names and bytes of the documents, in order.
        tokenizer_fingerprint: see `headway.data.tokenizers.tokenizer_fingerprint`.
        dtype: of tokens.bin, "<u2" or "<u4".
        vocabulary_size: every id is below it.
        eos_token_id: the id that ends each document.
        num_tokens: EOS tokens included.
        num_documents: as given.
        num_bytes: of the documents' text.
        num_undecodable: documents whose bytes were not UTF-8 and became U+FFFD in part (0 for the byte tokenizer).
        tokens_sha256: checksum of tokens.bin.
        documents_sha256: checksum of documents.npy.
    """

    format: str
    version: int
    data_fingerprint: str
    tokenizer_fingerprint: str
    dtype: str
    vocabulary_size: int
    eos_token_id: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_undecodable: int
    tokens_sha256: str
    documents_sha256: str


@dataclass(frozen=True, eq=False)
class TokenCache:
    """An open cache. Pickling it (for loader processes) sends the folder's name, not the tokens.

    Attributes:
        directory: where it lies.
        tokens: ids [num_tokens], memory-mapped, read-only, uint16 or uint32.
        document_offsets: int64 [num_documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]], its EOS included.
        metadata: counts and fingerprints.
    """

    directory: Path
    tokens: npt.NDArray[Any]
    document_offsets: npt.NDArray[np.int64]
    metadata: CacheMetadata

    @classmethod
    def open(cls, directory: str | PathLike[str], *, verify: bool = True) -> TokenCache:
        """Open a finished cache.

        Args:
            directory: as given to `build_token_cache`.
            verify: compare checksums, reading everything once (about a second per GB).

        Raises:
            DataError: missing, truncated, altered, or of another version.
        """
        directory = Path(directory)
        metadata = _read_metadata(directory)
        if verify:
            for name, expected in ((TOKENS_FILE, metadata.tokens_sha256), (DOCUMENTS_FILE, metadata.documents_sha256)):
                if _sha256(directory / name) != expected:
                    raise _damaged(directory, f"{name} was truncated or altered")
        try:
            offsets = np.load(directory / DOCUMENTS_FILE, mmap_mode="r", allow_pickle=False)
            tokens = np.memmap(directory / TOKENS_FILE, dtype=metadata.dtype, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(directory, str(error)) from error
        if len(tokens) != metadata.num_tokens:
            raise _damaged(directory, f"{TOKENS_FILE} holds {len(tokens)} tokens, expected {metadata.num_tokens}")
        if (
            offsets.dtype != np.int64
            or offsets.shape != (metadata.num_documents + 1,)
            or offsets[0] != 0
            or offsets[-1] != metadata.num_tokens
            or (verify and bool((np.diff(offsets) < 1).any()))
        ):
            raise _damaged(directory, f"{DOCUMENTS_FILE} does not describe {metadata.num_documents} documents")
        return cls(directory=directory, tokens=tokens, document_offsets=offsets, metadata=metadata)

    @property
    def num_tokens(self) -> int:
        """Tokens, EOS included."""
        return self.metadata.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents, each of at least its EOS."""
        return self.metadata.num_documents

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, EOS tokens counted: bits per byte = nats per token / ln 2 / this."""
        return self.metadata.num_bytes / self.metadata.num_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 of text and tokenizer together; changes when either does."""
        return hashlib.sha256(
            f"{self.metadata.data_fingerprint}{self.metadata.tokenizer_fingerprint}".encode()
        ).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.directory,)


def _reopen(directory: Path) -> TokenCache:
    return TokenCache.open(directory, verify=False)


def build_token_cache(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TokenCache:
    """Encode documents into a cache, or open the one that is already there for the same text and tokenizer.

    Memory stays bounded: documents are read one at a time and encoded in pieces of at most 1 MiB. (Where `directory`
    already holds a cache the documents are read twice, the first time for their fingerprint; an iterator that can be
    read only once is then held in memory.)

    Args:
        documents: their names and bytes, in order, make the fingerprint.
        tokenizer: any with an EOS token.
        directory: made with its parents.
        overwrite: replace a cache of other text or another tokenizer, or a damaged one; never a folder of other files.
        progress: called with the number of bytes encoded so far.

    Raises:
        DataError: no documents; a tokenizer without EOS; another cache or other files are there; it cannot be written.
    """
    directory = Path(directory).resolve()
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, and documents must end in one; "
            "set tokenizer.eos_token to one of its tokens"
        )
    wanted_tokenizer = tokenizer_fingerprint(tokenizer)
    try:
        if _occupied(directory):
            _refuse_other_files(directory)
            documents = list(documents) if iter(documents) is documents else documents
            existing = _reusable(directory, data_fingerprint(documents), wanted_tokenizer, overwrite=overwrite)
            if existing is not None:
                return existing
        with _staging(directory) as staging:
            metadata = _write(documents, tokenizer, staging, progress)
            _publish(staging, directory, metadata, overwrite=overwrite)
    except OSError as error:
        raise DataError(
            f"the token cache {str(directory)!r} could not be written ({error.strerror or error}); "
            f"free some space or name another folder"
        ) from error
    return TokenCache.open(directory, verify=False)


def _refuse_other_files(directory: Path) -> None:
    others = sorted({path.name for path in directory.iterdir()} - _FILES) if directory.is_dir() else ["a file"]
    if others:
        raise DataError(
            f"{str(directory)!r} holds something else than a token cache ({', '.join(map(repr, others[:3]))}); "
            f"name a new or empty folder for the cache"
        )


def _reusable(directory: Path, data: str, tokenizer: str, *, overwrite: bool) -> TokenCache | None:
    """The cache that is there if it is the wanted one; None if it may be replaced."""
    try:
        cache = TokenCache.open(directory)
    except DataError:
        if overwrite:
            return None
        raise
    changed = [
        what
        for what, was, now in (
            ("text", cache.metadata.data_fingerprint, data),
            ("tokenizer", cache.metadata.tokenizer_fingerprint, tokenizer),
        )
        if was != now
    ]
    if not changed:
        return cache
    if overwrite:
        return None
    raise DataError(
        f"the token cache {str(directory)!r} was built from another {' and another '.join(changed)}; "
        f"name another folder, or pass overwrite to build it anew"
    )


def _write(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Callable[[int], None] | None,
) -> CacheMetadata:
    encoder = DocumentEncoder(tokenizer)
    eos_token_id = int(tokenizer.eos_token_id)
    size = max(vocabulary_size(tokenizer), eos_token_id + 1)
    dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
    counts = _Counts(replaces_undecodable=not encoder.is_bytes)
    offsets, tokens_sha256 = _write_tokens(
        folder / TOKENS_FILE, _encoded(counts.watch(documents), encoder, progress), eos_token_id, dtype
    )
    if not counts.num_documents:
        raise DataError("a token cache needs at least one document: got none; check what the source or the split left")
    with (folder / DOCUMENTS_FILE).open("wb") as file:
        np.save(file, offsets)
        _to_disk(file)
    metadata = CacheMetadata(
        format=FORMAT,
        version=VERSION,
        data_fingerprint=counts.digest.hexdigest(),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=dtype.str,
        vocabulary_size=size,
        eos_token_id=eos_token_id,
        num_tokens=int(offsets[-1]),
        num_documents=counts.num_documents,
        num_bytes=counts.num_bytes,
        num_undecodable=counts.num_undecodable,
        tokens_sha256=tokens_sha256,
        documents_sha256=_sha256(folder / DOCUMENTS_FILE),
    )
    with (folder / METADATA_FILE).open("wb") as file:
        file.write((json.dumps(asdict(metadata), indent=2) + "\n").encode())
        _to_disk(file)
    return metadata


def _encoded(
    documents: Iterable[Document], encoder: DocumentEncoder, progress: Callable[[int], None] | None
) -> Iterator[tuple[npt.NDArray[Any], Piece]]:
    done = 0
    for batch in piece_batches(documents):
        yield from zip(encoder.encode([piece.data for piece in batch]), batch, strict=True)
        if progress is not None:
            done += sum(len(piece.data) for piece in batch)
            progress(done)


def _write_tokens(
    path: Path, encoded: Iterable[tuple[npt.NDArray[Any], Piece]], eos_token_id: int, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[np.int64], str]:
    """Write the ids and an EOS after each document; returns where documents start, and the file's checksum."""
    eos = np.array([eos_token_id], dtype=dtype).tobytes()
    offsets = array("q", [0])
    digest = hashlib.sha256()
    num_tokens = 0
    with path.open("wb") as file:
        for ids, piece in encoded:
            content = ids.astype(dtype, copy=False).tobytes() + (eos if piece.ends_document else b"")
            file.write(content)
            digest.update(content)
            num_tokens += len(content) // dtype.itemsize
            if piece.ends_document:
                offsets.append(num_tokens)
        _to_disk(file)
    return np.frombuffer(offsets, dtype=np.int64), digest.hexdigest()


class _Counts:
    """What passed by on the way to the encoder."""

    def __init__(self, *, replaces_undecodable: bool) -> None:
        self._replaces_undecodable = replaces_undecodable
        self.digest = DataDigest()
        self.num_documents = 0
        self.num_bytes = 0
        self.num_undecodable = 0

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.digest.add(document)
            self.num_documents += 1
            self.num_bytes += len(document.data)
            self.num_undecodable += self._replaces_undecodable and not is_utf8(document.data)
            yield document


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder beside the final one, gone at the end whatever happens (after kill -9 a `.partial` folder stays)."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, directory: Path, metadata: CacheMetadata, *, overwrite: bool) -> None:
    """Move the finished folder into place."""
    if _occupied(directory):
        # looked at again: another process may have finished the same cache meanwhile
        fingerprints = metadata.data_fingerprint, metadata.tokenizer_fingerprint
        _refuse_other_files(directory)
        if _reusable(directory, *fingerprints, overwrite=overwrite) is not None:
            return
        with _staging(directory) as old:
            directory.replace(old / directory.name)
            staging.replace(directory)
        return
    try:
        if directory.is_dir():
            directory.rmdir()
        staging.replace(directory)
    except OSError:
        if not _occupied(directory):
            raise
        _publish(staging, directory, metadata, overwrite=overwrite)


def _occupied(directory: Path) -> bool:
    """Whether something is there that moving a folder in would replace."""
    return directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_metadata(directory: Path) -> CacheMetadata:
    path = directory / METADATA_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no token cache at {str(directory)!r} ({METADATA_FILE} is missing); build it first") from error
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{METADATA_FILE} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(directory, f"{METADATA_FILE} is not of a token cache")
    if content.get("version") != VERSION:
        raise DataError(
            f"the token cache {str(directory)!r} has version {content.get('version')!r}, this headway reads {VERSION}; "
            f"build it anew"
        )
    types = {field.name: int if field.type == "int" else str for field in fields(CacheMetadata)}
    if content.keys() != types.keys() or any(type(content[name]) is not kind for name, kind in types.items()):
        raise _damaged(directory, f"{METADATA_FILE} does not have the fields of version {VERSION}")
    if content["dtype"] not in ("<u2", "<u4"):
        raise _damaged(directory, f"{METADATA_FILE} names the unknown dtype {content['dtype']!r}")
    return CacheMetadata(**content)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path.parent, f"{path.name}: {error.strerror}") from error


def _damaged(directory: Path, reason: str) -> DataError:
    return DataError(
        f"the token cache {str(directory)!r} is damaged ({reason}); delete the folder or build it anew with overwrite"
    )
