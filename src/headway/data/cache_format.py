"""A token cache on disk, opened: the ids, where documents start, and what they were made of.

<directory>/tokens.bin       little-endian uint16, uint32 where the vocabulary needs it; an EOS ends each document
<directory>/documents.npy    int64 [documents + 1]: where each document starts, and the number of tokens
<directory>/prompts.npy      int64 [documents]: tokens of each document's prompt; only where one has any
<directory>/metadata.json    versioned: fingerprints of text and tokenizer, counts, checksums of the others
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headway.errors import DataError

FORMAT = "headway-token-cache"
VERSION = 1
TOKENS_FILE = "tokens.bin"
DOCUMENTS_FILE = "documents.npy"
PROMPTS_FILE = "prompts.npy"
METADATA_FILE = "metadata.json"
INDEX_PREFIX = "corpus-"
"""What files begin with that say what a cache belongs to (`headway.data.corpus`)."""
CACHE_FILES = frozenset({TOKENS_FILE, DOCUMENTS_FILE, PROMPTS_FILE, METADATA_FILE})


@dataclass(frozen=True)
class CacheMetadata:
    """What `metadata.json` says.

    Attributes:
        format: "headway-token-cache".
        version: of the layout.
        data_fingerprint: SHA-256 over names and contents of the documents, in order.
        tokenizer_fingerprint: see `headway.data.fingerprint.tokenizer_fingerprint`.
        dtype: of tokens.bin, "<u2" or "<u4".
        vocabulary_size: every id is below it.
        eos_token_id: the id that ends each document.
        num_tokens: EOS tokens included.
        num_documents: as given.
        num_raw_documents: of them, those that were ids already and have no text.
        num_bytes: of the documents' text.
        num_prompt_tokens: read but not learned.
        num_prompt_bytes: of the prompts' text.
        num_undecodable: documents whose bytes were not UTF-8 and became U+FFFD in part (0 for the byte tokenizer).
        tokens_sha256: checksum of tokens.bin.
        documents_sha256: checksum of documents.npy.
        prompts_sha256: checksum of prompts.npy; empty where no document has a prompt.
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
    num_raw_documents: int
    num_bytes: int
    num_prompt_tokens: int
    num_prompt_bytes: int
    num_undecodable: int
    tokens_sha256: str
    documents_sha256: str
    prompts_sha256: str


@dataclass(frozen=True, eq=False)
class TokenCache:
    """An open cache. Pickling it (for loader processes) sends the folder's name, not the tokens.

    Attributes:
        directory: where it lies.
        tokens: ids [num_tokens], memory-mapped, read-only, uint16 or uint32.
        document_offsets: int64 [num_documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]], its EOS included.
        metadata: counts and fingerprints.
        prompt_lengths: int64 [num_documents], tokens of each document that are read but not learned; None where no
            document has any.
    """

    directory: Path
    tokens: npt.NDArray[Any]
    document_offsets: npt.NDArray[np.int64]
    metadata: CacheMetadata
    prompt_lengths: npt.NDArray[np.int64] | None = None

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
        metadata = read_metadata(directory)
        checksums = {
            TOKENS_FILE: metadata.tokens_sha256,
            DOCUMENTS_FILE: metadata.documents_sha256,
            PROMPTS_FILE: metadata.prompts_sha256,
        }
        if verify:
            for name, expected in checksums.items():
                if expected and file_sha256(directory / name) != expected:
                    raise damaged(directory, f"{name} was truncated or altered")
        try:
            offsets = np.load(directory / DOCUMENTS_FILE, mmap_mode="r", allow_pickle=False)
            tokens = np.memmap(directory / TOKENS_FILE, dtype=metadata.dtype, mode="r")
            prompts = (
                np.load(directory / PROMPTS_FILE, mmap_mode="r", allow_pickle=False)
                if metadata.prompts_sha256
                else None
            )
        except (OSError, ValueError, EOFError) as error:
            raise damaged(directory, str(error)) from error
        if len(tokens) != metadata.num_tokens:
            raise damaged(directory, f"{TOKENS_FILE} holds {len(tokens)} tokens, expected {metadata.num_tokens}")
        if (
            offsets.dtype != np.int64
            or offsets.shape != (metadata.num_documents + 1,)
            or offsets[0] != 0
            or offsets[-1] != metadata.num_tokens
            or (verify and bool((np.diff(offsets) < 1).any()))
        ):
            raise damaged(directory, f"{DOCUMENTS_FILE} does not describe {metadata.num_documents} documents")
        if prompts is not None and (prompts.dtype != np.int64 or prompts.shape != (metadata.num_documents,)):
            raise damaged(directory, f"{PROMPTS_FILE} does not describe {metadata.num_documents} documents")
        return cls(directory, tokens, offsets, metadata, prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens, EOS included."""
        return self.metadata.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents, each of at least its EOS."""
        return self.metadata.num_documents

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per token that is learned, EOS tokens counted; None where tokens stand for no text.

        Bits per byte = nats per token / ln 2 / this.
        """
        num_bytes = self.metadata.num_bytes - self.metadata.num_prompt_bytes
        if not num_bytes or self.metadata.num_raw_documents:
            return None
        return num_bytes / (self.metadata.num_tokens - self.metadata.num_prompt_tokens)

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


def read_metadata(directory: Path) -> CacheMetadata:
    """The metadata of a cache, checked.

    Raises:
        DataError: there is none, it cannot be read, or it is of another version.
    """
    path = directory / METADATA_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no token cache at {str(directory)!r} ({METADATA_FILE} is missing); build it first") from error
    except (OSError, ValueError) as error:
        raise damaged(directory, f"{METADATA_FILE} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged(directory, f"{METADATA_FILE} is not of a token cache")
    if content.get("version") != VERSION:
        raise DataError(
            f"the token cache {str(directory)!r} has version {content.get('version')!r}, this headway reads {VERSION}; "
            f"build it anew"
        )
    types = {field.name: int if field.type == "int" else str for field in fields(CacheMetadata)}
    if content.keys() != types.keys() or any(type(content[name]) is not kind for name, kind in types.items()):
        raise damaged(directory, f"{METADATA_FILE} does not have the fields of version {VERSION}")
    if content["dtype"] not in ("<u2", "<u4"):
        raise damaged(directory, f"{METADATA_FILE} names the unknown dtype {content['dtype']!r}")
    return CacheMetadata(**content)


def file_sha256(path: Path) -> str:
    """Checksum of a file of a cache.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path.parent, f"{path.name}: {error.strerror}") from error


def damaged(directory: Path, reason: str) -> DataError:
    """The error of a cache that cannot be used."""
    return DataError(
        f"the token cache {str(directory)!r} is damaged ({reason}); delete the folder or build it anew with overwrite"
    )
