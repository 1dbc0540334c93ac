"""Which source how much of the training came from, beside what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from headway.data.mixture import Mixture
from headway.data.packing import Rows


@dataclass(frozen=True)
class SourceShare:
    """One source of a mixture.

    Attributes:
        source: its name.
        asked: share that its weight asks for.
        drawn: share of the tokens drawn so far; rows have one length, so it is the share of rows.
    """

    source: str
    asked: float
    drawn: float


class DataMix:
    """Shares of the sources after any number of rows; nothing of it is saved, since the order is a pure function.

    Args:
        rows: of the run; one source alone has no mix.
    """

    def __init__(self, rows: Rows) -> None:
        self._mixture = rows if isinstance(rows, Mixture) else None
        self._rows, self._counts = 0, [0] * (0 if self._mixture is None else len(self._mixture.parts))

    def shares(self, rows: int) -> tuple[SourceShare, ...] | None:
        """Shares after the first `rows` rows of the run; None without a mixture.

        Args:
            rows: of all processes together, at least 1.
        """
        if self._mixture is None:
            return None
        self._count(self._mixture, rows)
        block = sum(self._mixture.counts)
        return tuple(
            SourceShare(part.name, asked / block, drawn / rows)
            for part, asked, drawn in zip(self._mixture.parts, self._mixture.counts, self._counts, strict=True)
        )

    def _count(self, mixture: Mixture, rows: int) -> None:
        """Go on from what was counted last, or from the last whole block, whichever is nearer."""
        block = sum(mixture.counts)
        blocks = rows // block
        if not blocks * block <= self._rows <= rows:
            self._rows, self._counts = blocks * block, [blocks * count for count in mixture.counts]
        for row in range(self._rows, rows):
            self._counts[mixture.locate(row)[0]] += 1
        self._rows = rows
