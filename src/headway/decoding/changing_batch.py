"""A batch whose rows come and go: `DecodingLoop` with limits of each row, joined and cut.

Newcomers are a batch of their own until their prompts are read. That gives each its first token and its draft, as it would
alone; then their rows are appended to the batch that is under way. A row that leaves is replaced by the last one, so the batch
stays a rectangle without holes and nobody else's keys and values move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headway.decoding.choosing import Emission
from headway.decoding.drafting import Block, LookupDrafter
from headway.decoding.joined_blocks import join_blocks, select_rows
from headway.decoding.loop import DecodingLoop
from headway.decoding.rows import Row


@dataclass
class ChangingBatch(DecodingLoop):
    """Rows that are decoded together for now.

    Attributes:
        members: the rows, in the order of the batch. The list is the chooser's and the drafter's too, and changed in place.
        reads_all_heads: whether heads run on prompts whatever is drafted next, as a controller may change its mind.
    """

    members: list[Row] = field(default_factory=list)
    reads_all_heads: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._limits = [row.request.max_new_tokens for row in self.members]
        self._rooms = list(self._limits)
        self.rows = [row.forwards for row in self.members]

    @property
    def capacity(self) -> int:
        """Slots that the longest of its rows can come to need."""
        return max(row.slots for row in self.members)

    @property
    def used_slots(self) -> int:
        """Slots of the cache that hold a token."""
        return sum(self._positions)

    @property
    def draft_length(self) -> int:
        """Drafted tokens that the next forward verifies."""
        return 0 if self._block is None else self._block.depth

    def live(self) -> list[int]:
        """Rows that go on."""
        gone = [row.cancelled or row.error is not None for row in self.members]
        return [number for number, room in enumerate(self._rooms) if room and not gone[number]]

    def absorb(self, other: ChangingBatch, *, rows: int) -> None:
        """Append the rows of a batch that has read its prompts and of which no row has ended.

        Args:
            other: not to be used afterwards.
            rows: to have room for in the cache.
        """
        assert self._block is not None
        assert other._block is not None
        self._drop_trial()
        self.executor.absorb(other.executor, other._positions, rows=rows)
        self._block = join_blocks(self._block, other._block)
        if isinstance(self.drafter, LookupDrafter) and isinstance(other.drafter, LookupDrafter):
            self.drafter.absorb(other.drafter)
        self.members += other.members
        self.rows += other.rows
        self._limits += other._limits
        self._rooms += other._rooms
        self._positions += other._positions

    def keep_live(self) -> None:
        """Let go of the rows that have ended; at least one has not."""
        live = self.live()
        if len(live) == len(self.members):
            return
        self._drop_trial()
        order = without_holes(live)
        assert self._block is not None
        self._block = select_rows(self._block, order)
        if isinstance(self.drafter, LookupDrafter):
            self.drafter.select(order)
        self.members[:] = [self.members[row] for row in order]
        self.rows = [row.forwards for row in self.members]
        self._limits = [self._limits[row] for row in order]
        self._rooms = [self._rooms[row] for row in order]
        self._positions = [self._positions[row] for row in order]
        self.executor.select(order, capacity=self.capacity)

    def _num_offsets(self, longest: int) -> int:
        if self._block is None and self.reads_all_heads:
            return 1 + self.num_heads
        # Not fewer near the rows' ends: a newcomer may join before them, and then the heads go on drafting for all.
        return 1 + min(self.num_heads, longest)

    def _lag(self) -> float:
        # Rows begin and end at different times, and nobody waits for the last one.
        return 0.0

    def _parted(self) -> bool:
        # Newcomers stand elsewhere, drafts or not.
        return False

    def _commit(self, emissions: list[Emission | None], block: Block) -> None:
        super()._commit(emissions, block)
        for number, row in enumerate(self.members):
            if row.error is not None:
                self._rooms[number] = 0


def without_holes(rows: Sequence[int]) -> list[int]:
    """The same rows in an order in which as many as possible keep their number.

    >>> without_holes([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    stay = [row for row in rows if row < len(rows)]
    move = iter(sorted(set(rows) - set(stay), reverse=True))
    return [row if row in set(stay) else next(move) for row in range(len(rows))]
