"""Training text that repeats held-out text is dropped, so that held-out figures mean what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from headway.data.sources import Document
from headway.errors import ConfigError

_WORD = re.compile(rb"\S+")
# bounds the memory of a text of any length to little more than its distinct n-grams
_WORDS_PER_BLOCK = 1 << 20
# odd, so that multiplying by its powers loses nothing modulo 2**64 (the golden ratio's bits)
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class DeduplicationReport:
    """What is left to train on.

    Attributes:
        kept: training documents in the order given.
        dropped: (name, overlap) of the others; overlap: the share of its own distinct n-grams that is held out.
    """

    kept: list[Document]
    dropped: tuple[tuple[str, float], ...]

    def describe(self) -> str:
        """One line for a person.

        >>> DeduplicationReport(kept=[], dropped=(("copy.py", 1.0),)).describe()
        "1 training document dropped as near-duplicate of held-out text ('copy.py' 100 %)"
        """
        named = ", ".join(f"{name!r} {100 * overlap:.0f} %" for name, overlap in self.dropped[:3])
        more = ", ..." if len(self.dropped) > 3 else ""
        return (
            f"{len(self.dropped)} training document{'' if len(self.dropped) == 1 else 's'} dropped as near-duplicate"
            f"{'' if len(self.dropped) == 1 else 's'} of held-out text{f' ({named}{more})' if named else ''}"
        )


def drop_near_duplicates(
    train: Iterable[Document], held_out: Iterable[Document], *, ngram: int = 13, max_overlap: float = 0.5
) -> DeduplicationReport:
    """Drop training documents of which more than `max_overlap` is also in held-out text.

    The overlap of a document is the share of its own distinct n-grams of whitespace-separated words that occur anywhere
    in the held-out documents. A document shorter than n words is compared whole with held-out documents as short as it:
    its overlap is 0 or 1. A document without a word is kept.

    Args:
        train: read once, one document at a time.
        held_out: their distinct n-grams are held in memory, 8 bytes each.
        ngram: words per n-gram.
        max_overlap: in [0, 1]; a document with exactly this overlap is kept.

    Raises:
        ConfigError: ngram < 1 or max_overlap outside [0, 1].
    """
    if ngram < 1 or not 0.0 <= max_overlap <= 1.0:
        raise ConfigError(
            f"ngram must be at least 1 and max_overlap in [0, 1]: got {ngram} and {max_overlap}; "
            f"the usual are 13 and 0.5"
        )
    grams = [_distinct_ngrams(document.data, ngram) for document in held_out]
    known = np.unique(np.concatenate(grams)) if grams else np.zeros(0, dtype=np.uint64)
    kept: list[Document] = []
    dropped: list[tuple[str, float]] = []
    for document in train:
        own = _distinct_ngrams(document.data, ngram)
        overlap = _count_known(own, known) / len(own) if len(own) else 0.0
        if overlap > max_overlap:
            dropped.append((document.name, overlap))
        else:
            kept.append(document)
    return DeduplicationReport(kept=kept, dropped=tuple(dropped))


def _distinct_ngrams(data: bytes, ngram: int) -> npt.NDArray[np.uint64]:
    """Sorted distinct 64-bit hashes of the n-grams of a text; of the whole text where it is shorter than n words.

    Python's own hash of bytes is keyed anew in every process; nothing but equality within one call is ever read from
    it. Of a billion n-grams beside a million held-out ones, one is taken for another with a probability of 5e-5.
    """
    hashes = (hash(match.group()) for match in _WORD.finditer(data))
    block = max(ngram, _WORDS_PER_BLOCK)
    words = _next_words(hashes, block)
    width = min(ngram, len(words))
    parts = []
    while len(words) >= width > 0:
        parts.append(np.unique(_hash_ngrams(words, width)))
        words = np.concatenate([words[len(words) - width + 1 :], _next_words(hashes, block)])
    if len(parts) > 1:
        return np.unique(np.concatenate(parts))
    return parts[0] if parts else words


def _next_words(hashes: Iterator[int], count: int) -> npt.NDArray[np.uint64]:
    return np.fromiter(islice(hashes, count), dtype=np.int64).view(np.uint64)


def _hash_ngrams(words: npt.NDArray[np.uint64], width: int) -> npt.NDArray[np.uint64]:
    # the width starts the sum: a short text must differ from an n-gram that begins with zeros
    grams = np.full(len(words) - width + 1, width, dtype=np.uint64)
    for place in range(width):
        grams *= np.uint64(_MULTIPLIER)
        grams += words[place : place + len(grams)]
    return grams


def _count_known(own: npt.NDArray[Any], known: npt.NDArray[Any]) -> int:
    if not len(known):
        return 0
    places = np.minimum(np.searchsorted(known, own), len(known) - 1)
    return int((known[places] == own).sum())
