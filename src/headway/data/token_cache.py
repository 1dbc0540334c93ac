"""Token caches, built: documents are encoded once, in parallel, into a memory-mapped stream of ids.

A cache (`headway.data.cache_format`) is built in a folder beside its place and moved there whole. It is reused when the
fingerprints of text and tokenizer agree and replaced only when asked. A build that was killed is taken up where its last
saved progress ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from headway.data.cache_format import CACHE_FILES, INDEX_PREFIX, CacheMetadata, TokenCache
from headway.data.cache_staging import Staging, aside, staging, unlock
from headway.data.cache_writer import CacheWriter, Progress, read_progress
from headway.data.cores import usable_cores
from headway.data.document import Document
from headway.data.encoding import DocumentEncoder, piece_batches
from headway.data.encoding_pool import encode_in_order
from headway.data.fingerprint import DataDigest, data_fingerprint, tokenizer_fingerprint
from headway.data.tokenizers import vocabulary_size
from headway.errors import DataError

__all__ = ["CacheMetadata", "TokenCache", "build_token_cache"]

SAVE_EVERY_BYTES = 1 << 26
"""Progress is saved after so many bytes of tokens."""


def build_token_cache(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> TokenCache:
    """Encode documents into a cache, or open the one that is already there for the same text and tokenizer.

    Memory stays bounded: documents are read a piece at a time. (Where `directory` already holds a cache the documents
    are read for their fingerprint first, unless they are a `Collection`, which knows it; an iterator that can be read
    only once is then held in memory.) The content does not depend on the number of workers.

    A build that is killed or interrupted leaves its progress, at most 64 MB of tokens behind, in a hidden folder beside
    the directory; the next build of the same documents goes on from there, that of others begins anew. An iterator that
    can be read only once always begins anew.

    Args:
        documents: their names and contents, in order, make the fingerprint.
        tokenizer: any with an EOS token.
        directory: made with its parents.
        overwrite: replace a cache of other text or another tokenizer, or a damaged one; never a folder of other files.
        progress: called with the number of bytes encoded so far.
        workers: processes that encode, of 0.1 to 0.3 GB each; None takes one per usable core. Small texts, and bytes,
            need none.

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
    workers = usable_cores() if workers is None else workers
    try:
        if _occupied(directory):
            _refuse_other_files(directory)
            documents = list(documents) if iter(documents) is documents else documents
            existing = _reusable(directory, data_fingerprint(documents), wanted_tokenizer, overwrite=overwrite)
            if existing is not None:
                return existing
        with staging(directory) as place:
            try:
                metadata = _write(documents, tokenizer, place, progress, workers)
            except (KeyboardInterrupt, SystemExit):
                place.keep = place.is_shared
                raise
            unlock(place, directory)
            _publish(place.folder, directory, metadata, overwrite=overwrite)
    except OSError as error:
        raise DataError(
            f"the token cache {str(directory)!r} could not be written ({error.strerror or error}); "
            f"free some space or name another folder"
        ) from error
    return TokenCache.open(directory, verify=False)


def _refuse_other_files(directory: Path) -> None:
    others = ["a file"]
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()} - CACHE_FILES
        others = sorted(name for name in names if not name.lstrip(".").startswith(INDEX_PREFIX))
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
    place: Staging,
    progress: Callable[[int], None] | None,
    workers: int,
) -> CacheMetadata:
    encoder = DocumentEncoder(tokenizer)
    eos_token_id = int(tokenizer.eos_token_id)
    size = max(vocabulary_size(tokenizer), eos_token_id + 1)
    dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4").str
    fresh = Progress(tokenizer_fingerprint(tokenizer), dtype)
    found = fresh
    if place.is_shared and iter(documents) is not documents:
        found = read_progress(place.folder, tokenizer_fingerprint=fresh.tokenizer_fingerprint, dtype=dtype)
    remaining, digest = _behind(documents, found)
    if digest is None:
        remaining, digest, found = iter(documents), DataDigest(), fresh
    writer = CacheWriter(
        place.folder,
        found,
        digest,
        eos_token_id=eos_token_id,
        replaces_undecodable=not encoder.is_bytes,
        sync=lambda file: _to_disk(file),
    )
    try:
        done = found.num_bytes
        batches = piece_batches(remaining, watch=writer.meet)
        for batch in encode_in_order(batches, encoder, workers=workers):
            for ids, piece in batch:
                writer.write(ids, piece)
                done += len(piece.data)
            if progress is not None:
                progress(done)
            if place.is_shared and writer.unsaved_bytes >= SAVE_EVERY_BYTES:
                writer.save_progress()
        if not writer.num_documents:
            raise DataError(
                "a token cache needs at least one document: got none; check what the source or the split left"
            )
        return writer.finish(vocabulary_size=size, eos_token_id=eos_token_id)
    finally:
        writer.close()


def _behind(documents: Iterable[Document], found: Progress) -> tuple[Iterator[Document], DataDigest | None]:
    """The documents behind those that a former writer encoded, and their digest; None if they were not the same."""
    digest = DataDigest()
    remaining = iter(documents)
    if not found.documents:
        return remaining, digest
    for _ in range(found.documents):
        document = next(remaining, None)
        if document is None:
            return remaining, None
        digest.add(document)
    return remaining, digest if digest.hexdigest() == found.data_fingerprint else None


def _publish(folder: Path, directory: Path, metadata: CacheMetadata, *, overwrite: bool) -> None:
    """Move the finished folder into place."""
    if _occupied(directory):
        # looked at again: another process may have finished the same cache meanwhile
        fingerprints = metadata.data_fingerprint, metadata.tokenizer_fingerprint
        _refuse_other_files(directory)
        if _reusable(directory, *fingerprints, overwrite=overwrite) is not None:
            return
        with aside(directory) as old:
            directory.replace(old / directory.name)
            folder.replace(directory)
        return
    try:
        if directory.is_dir():
            directory.rmdir()
        folder.replace(directory)
    except OSError:
        if not _occupied(directory):
            raise
        _publish(folder, directory, metadata, overwrite=overwrite)


def _occupied(directory: Path) -> bool:
    """Whether something is there that moving a folder in would replace."""
    return directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
