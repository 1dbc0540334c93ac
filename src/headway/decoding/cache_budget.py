"""How much cache the rows of a changing batch may take together.

A batch's cache is a rectangle: rows times the slots of the row that can come to need most. Rows are admitted only where the
rectangle fits at its limit, so no row ever has to leave for want of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headway.decoding.room import free_bytes
from headway.errors import DecodingError
from headway.model.memory import cache_footprint

FREE_SHARE = 0.5
"""Share of the memory that is free at the start which the cache may take where nobody names a limit."""


@dataclass(frozen=True)
class CacheBudget:
    """A limit in tokens, which are slots of a row.

    Attributes:
        tokens: rows x slots that there may be; None for no limit (nobody tells how much memory is free).
        bytes_per_token: keys and values of a token in all layers.
    """

    tokens: int | None
    bytes_per_token: int

    @classmethod
    def of(
        cls, model: Any, *, num_head_layers: int, max_cache_tokens: int | None, max_cache_bytes: int | None
    ) -> CacheBudget:
        """The budget of a model.

        Args:
            model: a `MultiTokenLM`.
            num_head_layers: cache layers of the heads.
            max_cache_tokens: the limit, where it is named in tokens.
            max_cache_bytes: the limit, where it is named in bytes; with neither it is `FREE_SHARE` of what is free.

        Raises:
            DecodingError: both limits, or one that is no positive number.
        """
        if max_cache_tokens is not None and max_cache_bytes is not None:
            raise DecodingError("max_cache_tokens and max_cache_bytes limit the same thing; pass one of them")
        for name, limit in (("max_cache_tokens", max_cache_tokens), ("max_cache_bytes", max_cache_bytes)):
            if limit is not None and limit < 1:
                raise DecodingError(f"{name} must be at least 1: got {limit}")
        weight = model.get_input_embeddings().weight
        per_token = cache_footprint(
            model.config, 1, dtype=weight.dtype, num_head_layers=num_head_layers
        ).bytes_per_token
        tokens = max_cache_tokens
        if tokens is None:
            free = free_bytes(weight.device)
            limit = max_cache_bytes if max_cache_bytes is not None else None if free is None else int(FREE_SHARE * free)
            tokens = None if limit is None else limit // per_token
        return cls(tokens, per_token)

    def fits(self, slots: Sequence[int]) -> bool:
        """Whether rows that can come to need so many slots each fit together."""
        return self.tokens is None or len(slots) * max(slots) <= self.tokens

    def rows_to_allocate(self, rows: int, capacity: int, *, most: int) -> int:
        """Room for newcomers, so that the batch is not moved for each: twice the rows, within the limits."""
        within = most if self.tokens is None else min(most, self.tokens // capacity)
        return max(rows, min(2 * rows, within))
