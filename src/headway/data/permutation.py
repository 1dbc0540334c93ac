"""A seeded shuffle that is computed for one index at a time."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

_ROUNDS = 12
_MASK = (1 << 64) - 1


def shuffled_index(index: int, *, size: int, seed: int, epoch: int) -> int:
    """Where a pseudo-random permutation of range(size) sends `index`; a pure function of its arguments.

    A Feistel network on pairs (index // b, index % b) with a * b just above `size`; results outside the range are sent
    through again. Constant memory for any size, and independent of the generators of numpy and torch, whose streams
    may change between versions: a run resumed years later sees the same order.

    >>> [shuffled_index(index, size=6, seed=0, epoch=0) for index in range(6)]
    [1, 0, 5, 3, 2, 4]

    Args:
        index: in range(size).
        size: at least 1.
        seed: another seed, another order.
        epoch: another epoch, another order.

    Raises:
        IndexError: index outside range(size).

    Source: generalised Feistel networks on Z_a x Z_b and cycle walking: Black and Rogaway, "Ciphers with arbitrary
    finite domains", CT-RSA 2002.
    """
    if not 0 <= index < size:
        raise IndexError(f"index must be in 0..{size - 1}: got {index}")
    keys = _round_keys(seed, epoch)
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    while True:
        row, column = divmod(index, columns)
        for position, key in enumerate(keys):
            if position % 2:
                column = (column + _mix(row ^ key)) % columns
            else:
                row = (row + _mix(column ^ key)) % rows
        index = row * columns + column
        if index < size:
            return index


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{number}".encode()).digest()[:8], "little")
        for number in range(_ROUNDS)
    )


def _mix(value: int) -> int:
    """The finalizer of SplitMix64: every input bit changes each output bit about half the time."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
