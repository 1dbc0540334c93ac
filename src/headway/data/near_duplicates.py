"""Training text that repeats held-out text is dropped, so that held-out figures mean what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from headway.data.collection import Collection
from headway.data.document import Document
from headway.data.split import selected
from headway.data.word_hashes import Hashes, ngram_blocks
from headway.errors import ConfigError

# bounds the memory of a text of any length to little more than the n-grams that have to be kept
_WORDS_PER_BLOCK = 1 << 20


@dataclass(frozen=True)
class DeduplicationReport:
    """What is left to train on.

    Attributes:
        kept: training documents in the order given.
        dropped: (name, overlap) of the others; overlap: the share of its own distinct n-grams that is held out.
    """

    kept: Sequence[Document]
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
    its overlap is 0 or 1. A document without a word is kept. Of raw ids, each id is a word.

    N-grams are compared by hashes of 64 bits: of a billion beside a million held-out ones, one is taken for another
    with a probability of 5e-5.

    Args:
        train: read once, one piece of a document at a time; a `Collection` stays on disk.
        held_out: their distinct n-grams are held in memory, 8 bytes each. (For one training document at a time, so are
            at most 1 / max_overlap as many of its own: with more than that it cannot be dropped.)
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
    known = _Distinct()
    for document in held_out:
        for block in ngram_blocks(document, ngram=ngram, words_per_block=max(ngram, _WORDS_PER_BLOCK)):
            known.add(block)
    comparison = _Comparison(known.hashes(), ngram, max_overlap)
    train = train if isinstance(train, Collection) else list(train)
    dropped = {}
    for number, document in enumerate(train):
        overlap = comparison.overlap(document)
        if overlap > max_overlap:
            dropped[number] = (document.name, overlap)
    kept = selected(train, [number not in dropped for number in range(len(train))])
    return DeduplicationReport(kept=kept, dropped=tuple(dropped.values()))


class _Comparison:
    """Measures how much of a document is held out, as far as it matters for dropping it."""

    def __init__(self, known: Hashes, ngram: int, max_overlap: float) -> None:
        self._known, self._ngram = known, ngram
        # with more distinct n-grams of its own than this, even all held-out ones would not be too large a share
        self._enough = len(known) / max_overlap if max_overlap else np.inf

    def overlap(self, document: Document) -> float:
        """The share of the document's distinct n-grams that is held out; 0 where it is certainly not too large."""
        if not len(self._known):
            return 0.0
        own, common = _Distinct(), _Distinct()
        for block in ngram_blocks(document, ngram=self._ngram, words_per_block=max(self._ngram, _WORDS_PER_BLOCK)):
            places = np.minimum(np.searchsorted(self._known, block), len(self._known) - 1)
            common.add(block[self._known[places] == block])
            own.add(block)
            if own.at_least > self._enough:
                return 0.0
        total = len(own.hashes())
        return len(common.hashes()) / total if total else 0.0


class _Distinct:
    """A set of hashes that grows by sorted blocks without repeats; merged whenever it has doubled."""

    def __init__(self) -> None:
        self._merged = np.zeros(0, dtype=np.uint64)
        self._blocks: list[Hashes] = []
        self._waiting = 0

    @property
    def at_least(self) -> int:
        """A number that the set certainly has."""
        return len(self._merged)

    def add(self, block: Hashes) -> None:
        """Take in sorted hashes without repeats."""
        if not len(self._merged) and not self._blocks:
            self._merged = block
            return
        self._blocks.append(block)
        self._waiting += len(block)
        if self._waiting > len(self._merged) + _WORDS_PER_BLOCK:
            self.hashes()

    def hashes(self) -> Hashes:
        """All of them, sorted, each once."""
        if self._blocks:
            self._merged = np.unique(np.concatenate([self._merged, *self._blocks]))
            self._blocks, self._waiting = [], 0
        return self._merged
