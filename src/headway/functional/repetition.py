"""How much a generated text repeats itself.

A greedy model that loops is easy to draft for, so its acceptance flatters: report this share beside every
acceptance that was measured on generated text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LOOPING_BELOW = 0.5
"""A text loops where fewer than this share of its 8-grams are distinct."""


def distinct_ngrams(sequences: Iterable[Sequence[int]], *, size: int = 8) -> float:
    """Share of distinct n-grams among all n-grams of the sequences: 1.0 never repeats, near 0 loops.

    n-grams are counted over all the sequences together (a phrase that two sequences share is one distinct
    n-gram) and none crosses from one sequence to the next. Returns NaN where no sequence has `size` tokens.

    >>> distinct_ngrams([[1, 2, 3, 1, 2, 3]], size=3)
    0.75

    Args:
        sequences: generated token ids without their prompts.
        size: tokens per n-gram.

    Raises:
        ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"size of an n-gram must be at least 1 token: got {size}; 8 is the project's convention")
    seen: set[tuple[int, ...]] = set()
    total = 0
    for sequence in sequences:
        for start in range(len(sequence) - size + 1):
            seen.add(tuple(sequence[start : start + size]))
            total += 1
    return len(seen) / total if total else float("nan")


def loops(tokens: Sequence[int]) -> bool:
    """Whether a generated text repeats itself so much that its acceptance says nothing.

    >>> loops([1, 2] * 20), loops(list(range(40))), loops([1, 1])
    (True, False, False)
    """
    return distinct_ngrams([tokens]) < LOOPING_BELOW
