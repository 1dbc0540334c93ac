"""What becomes of head caches where drafts change their length.

A forward after which nothing is drafted runs no head, so its positions are missing in the caches of the heads. When drafting
goes on, the forward repeats the last `REREAD` of them before its block and the heads fill them in; older ones stay missing and
are hidden from the heads (not from the base, whose cache is always whole). Near tokens matter most to a head, and the cost of
going on stays the same however long drafting rested; filling in everything would cost a fixed share of all plain forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headway.decoding.cache import RaggedCache
from headway.heads.base import Heads

REREAD = 16
"""Most positions that are repeated when drafting goes on."""


class HeadGaps:
    """Keeps count of what each cache layer of the heads is missing.

    Attributes:
        reread: most positions that a forward repeats for it, 0 for heads without caches.
    """

    def __init__(self, heads: Heads, cache: RaggedCache, *, longest: int) -> None:
        """Nothing is missing yet.

        Args:
            heads: of the model.
            cache: of base and heads; told what to hide.
            longest: K.
        """
        # Heads inside the base run in every forward.
        layers = 0 if heads.changes_base else heads.cache_layers(longest)
        self.reread = REREAD if layers else 0
        self._heads = heads
        self._cache = cache
        self._first_layer = len(cache.layers) - layers
        # What heads that draft in turn wrote for their last positions depends on drafts and counts as missing at once.
        self._lag = heads.lookback(longest)
        self._missing: list[list[int] | None] = [None] * layers

    def begin(self, positions: Sequence[int], drafts: int, *, room: bool = True) -> int:
        """A forward begins.

        Args:
            positions: of each row's last known token.
            drafts: tokens that will be drafted after it: so many heads run.
            room: whether the forward may repeat known positions (the block is a chain).

        Returns:
            How many known positions it has to repeat before its block.
        """
        running = self._heads.cache_layers(drafts) if self._missing else 0
        back = 0
        for layer, missing in enumerate(self._missing):
            if layer < running and missing is not None and room:
                longest = max(position - first for position, first in zip(positions, missing, strict=True))
                back = max(back, min(longest, self.reread))
        for layer, missing in enumerate(self._missing):
            if layer < running and missing is not None:
                self._close(layer, missing, positions, back)
            elif layer >= running and missing is None:
                self._missing[layer] = [max(0, position - self._lag) for position in positions]
        return max(back, self._heads.lookback(drafts)) if room else 0

    def absorb(self, positions: Sequence[int]) -> None:
        """Further rows join, whose caches lack nothing before their last known tokens at `positions`."""
        for missing in self._missing:
            if missing is not None:
                missing += [max(0, position - self._lag) for position in positions]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in the order given."""
        self._missing = [missing and [missing[row] for row in rows] for missing in self._missing]

    def _close(self, layer: int, missing: Sequence[int], positions: Sequence[int], back: int) -> None:
        """The layer runs again: what is not repeated stays hidden from it."""
        cache, index = self._cache, self._first_layer + layer
        hidden_BC = cache.hidden.get(index)
        if hidden_BC is None:
            shape = (len(positions), cache.capacity)
            hidden_BC = torch.zeros(shape, dtype=torch.bool, device=cache.rows_B1.device)
        for row, (first, position) in enumerate(zip(missing, positions, strict=True)):
            begin = max(0, position - back)
            hidden_BC[row, first:begin] = True
            hidden_BC[row, begin:] = False
        self._missing[layer] = None
        if bool(hidden_BC.any()):
            cache.hidden[index] = hidden_BC
        else:
            cache.hidden.pop(index, None)
