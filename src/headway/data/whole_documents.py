"""Rows that hold whole documents, so that no completion is torn from its prompt.

Legend: T positions of a row.

Documents of at most T tokens are never cut. They are put together so that little of a row stays empty: the longest
first, each into the fullest row that still has room ("best fit decreasing"). Longer documents are cut: text into rows
of its own, without losing a token; an example so that its completion stays, the prompt giving way from its beginning,
but not below half a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headway.data.cache_format import TokenCache
from headway.data.packing import PackedSample
from headway.data.permutation import shuffled_index
from headway.errors import ConfigError, DataError
from headway.functional.targets import IGNORE_INDEX

_Integers = npt.NDArray[np.int64]


class PackedDocuments:
    """Rows of whole documents of a cache, shuffled anew in every epoch.

    Which documents share a row depends on the cache and the length alone.

    Args:
        cache: an open token cache.
        sequence_length: T, at least 2.
        seed: of the order of the rows.

    Raises:
        ConfigError: sequence_length < 2.
        DataError: no row would have a label to learn.
    """

    def __init__(self, cache: TokenCache, *, sequence_length: int, seed: int) -> None:
        if sequence_length < 2:
            raise ConfigError(
                f"sequence_length must be at least 2 (a token and one to predict): got {sequence_length}; raise it"
            )
        self.cache = cache
        self.sequence_length = sequence_length
        self.seed = seed
        self._starts, self._lengths, self._prompts, self.num_shortened = _segments(cache, sequence_length)
        if not (self._lengths > np.maximum(self._prompts, 1)).any():
            raise DataError(
                f"no row of {sequence_length} tokens has a completion to learn; raise sequence_length, or check which "
                f"fields are prompt and completion"
            )
        self._order, self._row_starts = _best_fit_decreasing(self._lengths, sequence_length)

    def __len__(self) -> int:
        """Rows per epoch."""
        return len(self._row_starts) - 1

    @property
    def filled_fraction(self) -> float:
        """Share of the positions of all rows that hold a token."""
        return float(self._lengths.sum()) / (len(self) * self.sequence_length)

    def window(self, index: int) -> PackedSample:
        """The index-th row in the order of their first documents.

        Raises:
            IndexError: index outside range(len(self)).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}: got {index}")
        length = self.sequence_length
        chosen = self._order[self._row_starts[index] : self._row_starts[index + 1]]
        input_ids_T = np.full(length, self.cache.metadata.eos_token_id, dtype=np.int64)
        labels_T = np.full(length, IGNORE_INDEX, dtype=np.int64)
        place = 0
        for segment in chosen:
            start, size, prompt = self._starts[segment], self._lengths[segment], self._prompts[segment]
            input_ids_T[place : place + size] = self.cache.tokens[start : start + size]
            labels_T[place + prompt : place + size] = input_ids_T[place + prompt : place + size]
            place += size
        # the filling is a document of its own, which nothing sees and nothing predicts
        sizes = np.append(self._lengths[chosen], length - place)
        document_ids_T = np.repeat(np.arange(len(sizes)), sizes)
        position_ids_T = np.arange(length) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return PackedSample(input_ids_T, labels_T, position_ids_T, document_ids_T)

    def sample(self, index: int, epoch: int) -> PackedSample:
        """The index-th row of an epoch's own order.

        Raises:
            IndexError: index outside range(len(self)).
        """
        return self.window(shuffled_index(index, size=len(self), seed=self.seed, epoch=epoch))


def _segments(cache: TokenCache, length: int) -> tuple[_Integers, _Integers, _Integers, int]:
    """(start, length, prompt) of each stretch of tokens that stays together, and how many examples were shortened."""
    offsets = np.asarray(cache.document_offsets)
    starts, sizes = offsets[:-1].copy(), np.diff(offsets)
    prompts = np.zeros(len(starts), dtype=np.int64)
    if cache.prompt_lengths is not None:
        prompts = np.asarray(cache.prompt_lengths).copy()
    long_examples = (sizes > length) & (prompts > 0)
    if long_examples.any():
        completions = sizes - prompts
        kept = np.maximum(length - completions, np.minimum(prompts, length // 2))
        starts = np.where(long_examples, starts + prompts - kept, starts)
        sizes = np.where(long_examples, length, sizes)
        prompts = np.where(long_examples, kept, prompts)
    parts = -(-sizes // length)
    if (parts > 1).any():
        number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = np.repeat(starts, parts) + number * length
        sizes = np.minimum(np.repeat(sizes, parts) - number * length, length)
        prompts = np.repeat(prompts, parts)
    return starts, sizes, prompts, int(long_examples.sum())


def _best_fit_decreasing(sizes: _Integers, length: int) -> tuple[_Integers, _Integers]:
    """Segments in the order of their rows, and where each row starts in that order.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), section 2.2.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set iff a row has room for r more tokens
    count = 0
    for segment in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[segment])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = length, count
            count += 1
        rows[segment] = row
        if room > size:
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    # rows are numbered by their first segment, and hold their segments in the order of the text
    _, first, numbers = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[numbers]
    order = np.argsort(rank, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(rank, minlength=count))])
