"""Training text that repeats held-out text is dropped, so that held-out figures mean what they say."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headway.data.collection import Collection
from headway.data.cores import usable_cores
from headway.data.document import Document
from headway.data.split import selected
from headway.data.word_hashes import Batch, Hashes, ngram_blocks
from headway.errors import ConfigError

# bounds the memory of a text of any length to little more than the n-grams that have to be kept
_WORDS_PER_BLOCK = 1 << 20
_BATCHES_PER_THREAD = 2
_TABLE_ENTRIES_PER_HASH = 8
_MOST_TABLE_BITS = 30


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
    train: Iterable[Document],
    held_out: Iterable[Document],
    *,
    ngram: int = 13,
    max_overlap: float = 0.5,
    threads: int | None = None,
) -> DeduplicationReport:
    """Drop training documents of which more than `max_overlap` is also in held-out text.

    The overlap of a document is the share of its own distinct n-grams of whitespace-separated words that occur anywhere
    in the held-out documents. A document shorter than n words is compared whole with held-out documents as short as it:
    its overlap is 0 or 1. A document without a word is kept. Of raw ids, each id is a word.

    N-grams are compared by hashes of 64 bits: of a billion beside a million held-out ones, one is taken for another
    with a probability of 5e-5.

    Args:
        train: read once, one piece of a document at a time; a `Collection` stays on disk.
        held_out: their distinct n-grams are held in memory, 16 to 24 bytes each. (For one training document at a time,
            so are at most 1 / max_overlap as many of its own: with more than that it cannot be dropped.)
        ngram: words per n-gram.
        max_overlap: in [0, 1]; a document with exactly this overlap is kept.
        threads: that compare; None takes one per usable core. The result does not depend on them.

    Raises:
        ConfigError: ngram < 1 or max_overlap outside [0, 1].
    """
    if ngram < 1 or not 0.0 <= max_overlap <= 1.0:
        raise ConfigError(
            f"ngram must be at least 1 and max_overlap in [0, 1]: got {ngram} and {max_overlap}; "
            f"the usual are 13 and 0.5"
        )
    known = _Distinct()
    for document_or_batch in _batches(held_out):
        for block in _blocks(document_or_batch, ngram):
            known.add(block)
    comparison = _Comparison(known.hashes(), ngram, max_overlap)
    train = train if isinstance(train, Collection) else list(train)
    dropped = {}
    if comparison.matters:
        for number, overlap in enumerate(comparison.overlaps(train, threads=threads or usable_cores())):
            if overlap > max_overlap:
                dropped[number] = (train[number].name, overlap)
    kept = selected(train, [number not in dropped for number in range(len(train))])
    return DeduplicationReport(kept=kept, dropped=tuple(dropped.values()))


def _batches(documents: Iterable[Document]) -> Iterator[Batch | Document]:
    """Short documents together, so that each costs little, and long ones alone, to be read piece by piece."""
    contents: list[bytes] = []
    is_tokens, size = False, 0
    for document in documents:
        is_long = document.num_bytes > _WORDS_PER_BLOCK
        if contents and (is_long or document.is_tokens != is_tokens or size >= _WORDS_PER_BLOCK):
            yield Batch(contents, is_tokens)
            contents, size = [], 0
        if is_long:
            yield document
            continue
        is_tokens = document.is_tokens
        contents.append(document.data)
        size += document.num_bytes
    if contents:
        yield Batch(contents, is_tokens)


def _blocks(item: Batch | Document, ngram: int) -> Iterator[Hashes]:
    """Sorted distinct hashes of n-grams, block by block."""
    if isinstance(item, Batch):
        yield np.unique(item.ngrams(ngram)[0])
    else:
        yield from ngram_blocks(item, ngram=ngram, words_per_block=max(ngram, _WORDS_PER_BLOCK))


class _Comparison:
    """Measures how much of a document is held out, as far as it matters for dropping it."""

    def __init__(self, known: Hashes, ngram: int, max_overlap: float) -> None:
        self._known, self._ngram = known, ngram
        # with more distinct n-grams of its own than this, even all held-out ones would not be too large a share
        self._enough = len(known) / max_overlap if max_overlap else np.inf
        # most n-grams are nowhere held out, and one look into a table by their first bits tells it of nearly all
        bits = min(max((_TABLE_ENTRIES_PER_HASH * len(known)).bit_length(), 1), _MOST_TABLE_BITS)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[known >> self._shift] = True

    @property
    def matters(self) -> bool:
        """Whether anything is held out."""
        return len(self._known) > 0

    def overlaps(self, documents: Iterable[Document], *, threads: int) -> Iterator[float]:
        """The overlap of each document in order; 0 where it is certainly not too large."""
        waiting: deque[Future[list[float]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="near-duplicates") as pool:
            for item in _batches(documents):
                if isinstance(item, Batch):
                    waiting.append(pool.submit(self._of_batch, item))
                else:
                    # read here: documents on disk are not for several threads
                    waiting.append(Future())
                    waiting[-1].set_result([self._of_document(item)])
                while len(waiting) > _BATCHES_PER_THREAD * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _of_batch(self, batch: Batch) -> list[float]:
        grams, numbers = batch.ngrams(self._ngram)
        possible = np.flatnonzero(self._table[grams >> self._shift])
        found = possible[self._is_known(grams[possible])]
        count = len(batch.contents)
        suspects = np.zeros(count, dtype=bool)
        suspects[numbers[found]] = True
        # of documents with any n-gram in common, which are few, all distinct ones are counted
        chosen = suspects[numbers]
        grams, numbers = grams[chosen], numbers[chosen]
        order = np.lexsort((grams, numbers))
        grams, numbers = grams[order], numbers[order]
        first = np.ones(len(grams), dtype=bool)
        first[1:] = (grams[1:] != grams[:-1]) | (numbers[1:] != numbers[:-1])
        grams, numbers = grams[first], numbers[first]
        own = np.bincount(numbers, minlength=count)
        common = np.bincount(numbers[self._is_known(grams)], minlength=count)
        overlaps: list[float] = (common / np.maximum(own, 1)).tolist()
        return overlaps

    def _of_document(self, document: Document) -> float:
        own, common = _Distinct(), _Distinct()
        for block in _blocks(document, self._ngram):
            common.add(block[self._is_known(block)])
            own.add(block)
            if own.at_least > self._enough:
                return 0.0
        total = len(own.hashes())
        return len(common.hashes()) / total if total else 0.0

    def _is_known(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        places = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
        known: npt.NDArray[np.bool_] = self._known[places] == hashes
        return known


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
