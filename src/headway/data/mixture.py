"""Several sources in stated shares: which row comes when is a pure function of the seed and a number.

The samples of a run are cut into blocks of equal length. Every block has the same number of rows of each source, in an
order shuffled anew for each block; so the shares are exact after every block, and how many rows of a source came before
is known without counting. Each source goes through its own epochs at its own pace, every row once in each.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from headway.data.cache_format import TokenCache
from headway.data.packing import PackedSample, PackedTokens, Rows
from headway.data.permutation import shuffled_index
from headway.data.shares import block_counts
from headway.data.whole_documents import PackedDocuments
from headway.errors import ConfigError


@dataclass(frozen=True, eq=False)
class MixturePart:
    """One source of a mixture.

    Attributes:
        name: for a person.
        rows: what it has.
        weight: its share, relative to the others'.
    """

    name: str
    rows: Rows
    weight: float


class Mixture:
    """Rows of several sources in stated shares; an epoch is as many rows as all of them have together.

    Args:
        parts: at least one; their rows have one length.
        seed: of the order in which sources take turns.

    Raises:
        ConfigError: no parts, rows of different lengths, or a weight too small beside the others.
    """

    def __init__(self, parts: Sequence[MixturePart], *, seed: int) -> None:
        lengths = {part.rows.sequence_length for part in parts}
        if len(lengths) != 1:
            raise ConfigError(
                f"a mixture needs parts with rows of one length: got {sorted(lengths) or 'no parts'}; pack all of them "
                f"with the same sequence_length"
            )
        self.parts = tuple(parts)
        self.counts = block_counts([part.weight for part in parts])
        self._ends = [*accumulate(self.counts)]
        self._length = lengths.pop()
        # told apart from the seed that shuffles the rows of a source
        self._seed = int.from_bytes(hashlib.sha256(f"mixture/{seed}".encode()).digest()[:8], "little")

    @property
    def sequence_length(self) -> int:
        """T of every row."""
        return self._length

    def __len__(self) -> int:
        """Rows per epoch: of all sources together."""
        return sum(len(part.rows) for part in self.parts)

    def sample(self, index: int, epoch: int) -> PackedSample:
        """The index-th row of an epoch.

        Raises:
            IndexError: index outside range(len(self)).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}: got {index}")
        number, place = self.locate(epoch * len(self) + index)
        rows = self.parts[number].rows
        own_epoch, own_index = divmod(place, len(rows))
        return rows.sample(own_index, own_epoch)

    def locate(self, global_index: int) -> tuple[int, int]:
        """Which source gives a sample of the run, and how many samples the source gives before it in its own order.

        Args:
            global_index: of the sample, counted from 0 over all epochs.
        """
        block, place = divmod(global_index, self._ends[-1])
        slot = shuffled_index(place, size=self._ends[-1], seed=self._seed, epoch=block)
        number = bisect_right(self._ends, slot)
        before = self._ends[number] - self.counts[number]
        return number, block * self.counts[number] + slot - before

    def describe(self, samples: int) -> str:
        """One line for a person: the share of each source, and how often a run of so many samples goes through it."""
        total = self._ends[-1]
        return ", ".join(
            f"{part.name} {100 * count / total:.3g} % ({samples * count / total / len(part.rows):.3g} epochs)"
            for part, count in zip(self.parts, self.counts, strict=True)
        )


def pack_rows(cache: TokenCache, *, sequence_length: int, seed: int) -> Rows:
    """Rows of a cache: whole documents where it has prompts, windows of its stream where it has none.

    Raises:
        ConfigError: sequence_length < 2.
        DataError: prompts only.
    """
    packing = PackedTokens if cache.prompt_lengths is None else PackedDocuments
    return packing(cache, sequence_length=sequence_length, seed=seed)
