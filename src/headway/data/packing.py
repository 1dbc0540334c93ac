"""Windows of equal length over the token stream, each knowing where its documents start.

Legend: T positions of a window.

The windows of an epoch cut the stream every T tokens, so every token is in exactly one of them. The last window is
filled up with EOS tokens whose label is -100 and which are a document of their own: no token is lost, nothing sees or
predicts the filling. Which window comes when is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headway.data.cache_format import TokenCache
from headway.data.permutation import shuffled_index
from headway.errors import ConfigError
from headway.functional.targets import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class PackedSample:
    """One window; four int64 arrays [T].

    Attributes:
        input_ids_T: token ids.
        labels_T: the same ids, not shifted; -100 at the filling and on prompts.
        position_ids_T: positions within the document, from 0 at each document start and at the window start.
        document_ids_T: 0, 1, ... in the window; says which positions belong together.
    """

    input_ids_T: npt.NDArray[np.int64]
    labels_T: npt.NDArray[np.int64]
    position_ids_T: npt.NDArray[np.int64]
    document_ids_T: npt.NDArray[np.int64]


class Rows(Protocol):
    """Rows of equal length in an order that is shuffled anew in every epoch: what a loader takes."""

    @property
    def sequence_length(self) -> int:
        """T of every row."""

    def __len__(self) -> int:
        """Rows per epoch."""

    def sample(self, index: int, epoch: int) -> PackedSample:
        """The index-th row of an epoch's own order, a pure function of its arguments."""


def cut_window(cache: TokenCache, start: int, length: int) -> PackedSample:
    """The window of `length` tokens from token `start`, filled up where the stream ends before.

    Args:
        cache: the stream.
        start: in range(num_tokens).
        length: T, at least 1.
    """
    stop = min(start + length, cache.num_tokens)
    input_ids_T = np.full(length, cache.metadata.eos_token_id, dtype=np.int64)
    input_ids_T[: stop - start] = cache.tokens[start:stop]
    labels_T = input_ids_T.copy()
    labels_T[stop - start :] = IGNORE_INDEX

    # the last offset is the number of tokens, so the filling starts a document too
    offsets = cache.document_offsets
    first = np.searchsorted(offsets, start, side="right")
    last = np.searchsorted(offsets, start + length, side="left")
    starts = np.concatenate([[0], offsets[first:last] - start])
    lengths = np.diff(starts, append=length)
    document_ids_T = np.repeat(np.arange(len(starts)), lengths)
    position_ids_T = np.arange(length) - np.repeat(starts, lengths)
    if cache.prompt_lengths is not None:
        documents = np.arange(first - 1, first - 1 + len(starts))
        documents = documents[documents < cache.num_documents]  # behind the last one is the filling
        prompt_ends = np.zeros(len(starts), dtype=np.int64)
        prompt_ends[: len(documents)] = offsets[documents] + cache.prompt_lengths[documents] - start
        labels_T[np.arange(length) < np.repeat(prompt_ends, lengths)] = IGNORE_INDEX
    return PackedSample(input_ids_T, labels_T, position_ids_T, document_ids_T)


class PackedTokens:
    """The windows of a cache, shuffled anew in every epoch.

    Args:
        cache: an open token cache.
        sequence_length: T, at least 2 (a single token has nothing to predict).
        seed: of the order.

    Raises:
        ConfigError: sequence_length < 2.
    """

    def __init__(self, cache: TokenCache, *, sequence_length: int, seed: int) -> None:
        if sequence_length < 2:
            raise ConfigError(
                f"sequence_length must be at least 2 (a token and one to predict): got {sequence_length}; raise it"
            )
        self.cache = cache
        self.sequence_length = sequence_length
        self.seed = seed

    def __len__(self) -> int:
        """Windows per epoch."""
        return -(-self.cache.num_tokens // self.sequence_length)

    def window(self, index: int) -> PackedSample:
        """The index-th window in the order of the stream.

        Raises:
            IndexError: index outside range(len(self)).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window must be in 0..{len(self) - 1}: got {index}")
        return cut_window(self.cache, index * self.sequence_length, self.sequence_length)

    def sample(self, index: int, epoch: int) -> PackedSample:
        """The index-th window of an epoch's own order.

        Raises:
            IndexError: index outside range(len(self)).
        """
        return self.window(shuffled_index(index, size=len(self), seed=self.seed, epoch=epoch))
