"""From weights to whole numbers of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from headway.errors import ConfigError

LONGEST_BLOCK = 10_000
"""Shares are exact where a block of at most so many rows can hold them, else rounded to the nearest 1/10,000."""


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in a block, in the proportion of the weights.

    >>> block_counts([0.7, 0.3]), block_counts([1, 1, 2]), block_counts([2 ** 0.5, 1])
    ((7, 3), (1, 1, 2), (2929, 2071))

    Raises:
        ConfigError: a weight that is not above 0, or less than 1/20,000 of all.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"weights must be above 0: got {list(weights)}; correct them, or drop the source")
    # as a person wrote them: 0.1 is a tenth, not the binary number next to it
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    block = math.lcm(*(share.denominator for share in shares))
    if block > LONGEST_BLOCK:
        block = LONGEST_BLOCK
    counts = [math.floor(share * block) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: (counts[number] - shares[number] * block, number))
    for number in by_remainder[: block - sum(counts)]:
        counts[number] += 1
    if not all(counts):
        smallest = min(weights)
        raise ConfigError(
            f"the weight {smallest:g} is too small beside {sum(weights):g} in all: the smallest share is "
            f"1/{LONGEST_BLOCK}; raise it, or drop the source"
        )
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)
