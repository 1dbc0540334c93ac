"""Commands that a launcher (`torchrun`) started several times over: one of them speaks for all."""

from __future__ import annotations

import os

EXIT_USAGE = 2


def launched_rank() -> int:
    """The number of this process among those that a launcher started; 0 for one that stands alone."""
    try:
        return int(os.environ["RANK"]) if "WORLD_SIZE" in os.environ else 0
    except (KeyError, ValueError):
        return 0
