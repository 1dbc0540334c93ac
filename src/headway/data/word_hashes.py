"""Hashes of the words of a text and of its n-grams, a million at a time.

A word is what stands between whitespace. Its hash is a polynomial in its bytes modulo 2**64, made for all words of a
piece at once from the running sum of their terms; an n-gram's is a polynomial in its words. Both depend on the text
alone, so they are the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headway.data.document import TOKEN_DTYPE, Document

Hashes = npt.NDArray[np.uint64]

# odd, so that multiplying by its powers loses nothing modulo 2**64 (the golden ratio's bits)
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
_TOKEN_BYTES = np.dtype(TOKEN_DTYPE).itemsize
_IS_SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\f\v", dtype=np.uint8))


def _mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 on every item: polynomials alone leave their low bits too regular."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = values ^ (values >> np.uint64(31))
    return mixed


_BYTE_VALUES = _mixed(np.arange(1, 257, dtype=np.uint64))


class _Powers:
    """The powers of the multiplier and of its inverse, as many as have been needed so far."""

    def __init__(self) -> None:
        self._both = np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64)

    def upto(self, count: int) -> tuple[Hashes, Hashes]:
        up, down = self._both
        if len(up) < count:
            # one assignment: several threads may come here at once
            self._both = up, down = self._powers(_MULTIPLIER, count), self._powers(_INVERSE, count)
        return up[:count], down[:count]

    def _powers(self, base: int, count: int) -> Hashes:
        factors = np.full(count, base, dtype=np.uint64)
        factors[0] = 1
        powers: Hashes = np.multiply.accumulate(factors)
        return powers


_POWERS = _Powers()


def hash_words(piece: bytes) -> Hashes:
    """One hash per word of a piece, in order; equal words have equal hashes wherever they stand."""
    return _words(piece)[0]


def _words(data: bytes) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The hashes of words, and where the words start."""
    codes = np.frombuffer(data, dtype=np.uint8)
    if not len(codes):
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    inside = ~_IS_SPACE[codes]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    ends: list[Any] = [[0] if inside[0] else [], edges, [len(codes)] if inside[-1] else []]
    edges = np.concatenate(ends).astype(np.int64)
    starts, stops = edges[0::2], edges[1::2]
    up, down = _POWERS.upto(len(codes))
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(_BYTE_VALUES[codes] * up, out=sums[1:])
    return _mixed((sums[stops] - sums[starts]) * down[starts]), starts


def _token_words(data: bytes) -> Hashes:
    return _mixed(np.frombuffer(data, dtype=TOKEN_DTYPE).astype(np.uint64) + np.uint64(1))


class Batch(NamedTuple):
    """The contents of some short documents.

    Attributes:
        contents: of each, whole.
        is_tokens: whether they are ids; all or none.
    """

    contents: list[bytes]
    is_tokens: bool

    def ngrams(self, ngram: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
        """Hashes of the n-grams of all documents, not sorted, with repeats, and the number of each one's document.

        A document shorter than n words has one, of the whole.
        """
        if self.is_tokens:
            words = _token_words(b"".join(self.contents))
            counts = np.array([len(content) // _TOKEN_BYTES for content in self.contents], dtype=np.int64)
        else:
            # a byte between two documents keeps their words apart, and is counted to the first
            words, starts = _words(b"\n".join(self.contents))
            ends = np.cumsum([len(content) + 1 for content in self.contents])
            counts = np.diff(np.searchsorted(starts, ends, side="left"), prepend=0)
        owners = np.repeat(np.arange(len(counts)), counts)
        grams, numbers = [], []
        if len(words) >= ngram:
            inside = owners[: len(words) - ngram + 1] == owners[ngram - 1 :]
            grams.append(_hash_ngrams(words, ngram)[inside])
            numbers.append(owners[: len(inside)][inside])
        first = np.cumsum(counts) - counts
        for width in np.unique(counts[(counts > 0) & (counts < ngram)]):
            short = np.flatnonzero(counts == width)
            rows = words[first[short][:, None] + np.arange(width)]
            grams.append(_hash_rows(rows))
            numbers.append(short)
        if not grams:
            return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
        return np.concatenate(grams), np.concatenate(numbers)


def word_blocks(document: Document, *, words_per_block: int) -> Iterator[Hashes]:
    """The hashes of a document's words, or of its ids where it is tokens, in order and at most so many at a time.

    Words above 1 MiB are several.
    """
    for piece in document.pieces():
        words = _token_words(piece) if document.is_tokens else hash_words(piece)
        for start in range(0, len(words), words_per_block):
            yield words[start : start + words_per_block]


def ngram_blocks(document: Document, *, ngram: int, words_per_block: int) -> Iterator[Hashes]:
    """Hashes of a document's n-grams, sorted and distinct within each block; of the whole where it is shorter."""
    words = np.zeros(0, dtype=np.uint64)
    longer = False
    for block in word_blocks(document, words_per_block=words_per_block):
        words = np.concatenate([words, block])
        if len(words) >= ngram:
            longer = True
            yield np.unique(_hash_ngrams(words, ngram))
            words = words[len(words) - (ngram - 1) :]
    if len(words) and not longer:
        yield _hash_ngrams(words, len(words))


def _hash_ngrams(words: Hashes, width: int) -> Hashes:
    # the width starts the sum: a short text must differ from an n-gram that begins with zeros
    grams = np.full(len(words) - width + 1, width, dtype=np.uint64)
    for place in range(width):
        grams *= np.uint64(_MULTIPLIER)
        grams += words[place : place + len(grams)]
    return grams


def _hash_rows(rows: Hashes) -> Hashes:
    """The same polynomial, of each row of a matrix."""
    grams = np.full(len(rows), rows.shape[1], dtype=np.uint64)
    for column in rows.T:
        grams *= np.uint64(_MULTIPLIER)
        grams += column
    return grams
