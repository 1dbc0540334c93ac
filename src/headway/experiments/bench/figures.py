"""Figures of paired rounds: medians with intervals, ratios, break-even."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A median over rounds with its 95 % interval (percentile bootstrap over rounds); NaN where nothing was measured."""

    median: float
    low: float
    high: float


NOTHING = Estimate(math.nan, math.nan, math.nan)


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The median of the rounds and the percentile bootstrap's 95 % interval of it.

    The rounds are drawn with replacement, so few rounds can give no interval wider than themselves: with fewer than 6 it
    covers less than it says.

    >>> estimate([2.0, 2.0, 2.0])
    Estimate(median=2.0, low=2.0, high=2.0)

    Args:
        values: one figure per round.
        seed: of the resampling; the same values give the same interval.
    """
    if not values or not all(map(math.isfinite, values)):
        return NOTHING
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return Estimate(
        statistics.median(values), medians[round(0.025 * (_RESAMPLES - 1))], medians[round(0.975 * (_RESAMPLES - 1))]
    )


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The ratio of two figures that were measured in the same rounds: each round gives one ratio.

    >>> paired_ratio([3.0, 6.0], [1.0, 2.0]).median
    3.0

    Args:
        above: one figure per round.
        below: of the same rounds, in the same order.
    """
    pairs = list(zip(above, below, strict=True))
    if any(not b > 0 for _, b in pairs):
        return NOTHING
    return estimate([a / b for a, b in pairs])


def break_even(tokens_per_forward: float, speedup: float) -> float:
    """Tokens per forward at which an arm would be as fast as what `speedup` compares it with.

    The seconds of a forward do not depend on what is accepted, so speed grows with tokens per forward in proportion: at
    `speedup` 2 with 3 tokens per forward, 1.5 are enough.

    >>> break_even(3.0, 2.0)
    1.5
    """
    return tokens_per_forward / speedup if speedup > 0 else math.nan


def break_even_batch(ratios: Sequence[tuple[int, float]]) -> float | None:
    """Rows decoded together at which drafts stop paying: where the speed-up falls below 1, between the batches on both sides.

    >>> break_even_batch([(1, 2.0), (2, 1.5), (8, 0.5)]), break_even_batch([(1, 0.9)]), break_even_batch([(1, 1.5), (4, 1.2)])
    (4.0, 0.0, None)

    Args:
        ratios: batch and speed-up over the fastest plain engine there.

    Returns:
        On a straight line over the logarithm of the batch; 0 where the smallest batch does not pay already, None where all do.
    """
    before: tuple[int, float] | None = None
    for batch, ratio in sorted(ratios):
        if ratio < 1:
            if before is None:
                return 0.0
            share = (before[1] - 1) / (before[1] - ratio)
            return float(before[0] * (batch / before[0]) ** share)
        before = (batch, ratio)
    return None


def until_end(tokens: Sequence[int], end_token_ids: frozenset[int]) -> list[int]:
    """The tokens up to the first end of text, that one included: what follows is padding and counts for nobody.

    >>> until_end([5, 6, 0, 0, 0], frozenset({0}))
    [5, 6, 0]
    """
    for place, token in enumerate(tokens):
        if token in end_token_ids:
            return list(tokens[: place + 1])
    return list(tokens)
