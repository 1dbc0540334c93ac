"""Where two generations part, and whether rounding explains it.

Legend: B rows, V vocabulary.

Sums depend on how many positions a product has, so positions computed one at a time and in blocks differ by rounding, and
where the model's choice hangs on less than that, two ways of decoding may part without either being wrong. A report names the
first difference, the two tokens, what both ways said about them there, and how far apart these are in units of rounding. After
the first difference the texts have different pasts, and nothing about them can be compared.

What is explained: the two ways agree about every logit at that place up to rounding, and the choice between the two tokens
hangs on less than the limit. A wrong mask, position or cache shows as logits that disagree by more, whatever the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headway.decoding.statistics import GenerationResult

NEAR_TIE_GAP = 1e-5
"""Logit gap, or share of probability, below which a different choice is rounding in float32 and float64."""

WIDE_UNITS, NARROW_UNITS = 64, 8
"""Units of rounding by which logits may disagree: float32 and wider round at every addition of a product, narrower dtypes
once per product, whose sum is float32."""

Verdict = Literal["near-tie", "not explained"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference of one row.

    Attributes:
        row: of the batch.
        position: index of the new token, from 0.
        expected: the plain token there, None where the plain text had ended.
        found: the other one.
        expected_logits: of the two tokens in that order, as the plain way has them; after processors.
        found_logits: the same as the other way has them.
        gap: by how much the plain way prefers its token: in logits, or, where tokens were drawn, in probability: the
            distance from the drawn number to the share of the other token.
        deviation: largest difference of any logit between the two ways, before processors.
        unit: one rounding of the model's dtype at the largest logit.
        gap_in_units: gap / unit; None where tokens were drawn.
        deviation_in_units: deviation / unit.
        drawn: whether tokens were drawn.
        verdict: "near-tie" where rounding explains the difference.
    """

    row: int
    position: int
    expected: int | None
    found: int | None
    expected_logits: tuple[float, float] | None
    found_logits: tuple[float, float] | None
    gap: float | None
    deviation: float | None
    unit: float | None
    gap_in_units: float | None
    deviation_in_units: float | None
    drawn: bool
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def sentence(self) -> str:
        """For a person."""
        start = f"row {self.row}, new token {self.position + 1}: {self.found} instead of {self.expected}"
        if self.gap is None:
            return f"{start}; {self.verdict}: only one of the texts goes on there"
        what = "the drawn number is within" if self.drawn else "their logits differ by"
        return (
            f"{start}; {what} {self.gap:.2g}, the two ways differ by {self.deviation:.2g} "
            f"({self.deviation_in_units:.1f} roundings): {self.verdict}"
        )


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs; where one is the beginning of the other, the shorter one's length.

    >>> first_difference([1, 2, 3], [1, 2, 4]), first_difference([1, 2], [1, 2, 3]), first_difference([1], [1])
    (2, 2, None)
    """
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def differences(
    plain: GenerationResult,
    other: GenerationResult,
    *,
    dtype: torch.dtype,
    uniform: Callable[[int, int], float] | None = None,
) -> list[Difference]:
    """The first difference of every row in which two generations of the same prompts differ.

    Args:
        plain: with `output_scores` and `output_logits`.
        other: likewise.
        dtype: of the model.
        uniform: where tokens were drawn: (row, index of the new token) -> the drawn number.

    Raises:
        ValueError: results without scores and logits.
    """
    if plain.scores is None or plain.logits is None or other.scores is None or other.logits is None:
        raise ValueError("a report needs what the model said: generate with output_scores=True and output_logits=True")
    texts = [_new_tokens(result) for result in (plain, other)]
    found = []
    for row, (expected, got) in enumerate(zip(*texts, strict=True)):
        place = first_difference(got, expected)
        if place is None:
            continue
        if place >= min(len(expected), len(got)):
            tokens = [text[place] if place < len(text) else None for text in (expected, got)]
            found.append(_ended(row, place, *tokens, drawn=uniform is not None))
            continue
        found.append(
            explain(
                expected[place],
                got[place],
                scores=(plain.scores[place][row], other.scores[place][row]),
                logits=(plain.logits[place][row], other.logits[place][row]),
                dtype=dtype,
                uniform=None if uniform is None else uniform(row, place),
                row=row,
                position=place,
            )
        )
    return found


def explain(
    expected: int,
    found: int,
    *,
    scores: tuple[Tensor, Tensor],
    logits: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    uniform: float | None = None,
    row: int = 0,
    position: int = 0,
) -> Difference:
    """Whether rounding explains that one way chose one token and the other another.

    >>> plain, other = torch.tensor([2.0, 2.000001, -1.0]), torch.tensor([2.000001, 2.0, -1.0])
    >>> explain(1, 0, scores=(plain, other), logits=(plain, other), dtype=torch.float32).verdict
    'near-tie'

    Args:
        expected: the plain way's token.
        found: the other way's.
        scores: [V] after processors, of the plain way and of the other.
        logits: [V] before processors, likewise.
        dtype: of the model.
        uniform: the drawn number; None where the largest score is chosen.
        row: goes into the report.
        position: goes into the report.
    """
    plain_V, other_V = (score_V.double() for score_V in scores)
    left_V, right_V = (logit_V.double() for logit_V in logits)
    largest = max(float(left_V.abs().max()), float(right_V.abs().max()), torch.finfo(dtype).tiny)
    unit = torch.finfo(dtype).eps * largest
    deviation = float((left_V - right_V).abs().max())
    drawn = uniform is not None
    gap = float(plain_V[expected] - plain_V[found])
    if uniform is not None:
        gap = _distance_to_share(plain_V, found, uniform)
    narrow = torch.finfo(dtype).bits < torch.finfo(torch.float32).bits
    units = NARROW_UNITS if narrow else WIDE_UNITS
    # A logit that moves by d moves a probability by at most d / 2.
    limit = NARROW_UNITS * unit / (2 if drawn else 1) if narrow else NEAR_TIE_GAP
    explained = gap <= limit and deviation <= units * unit
    return Difference(
        row=row,
        position=position,
        expected=expected,
        found=found,
        expected_logits=(float(plain_V[expected]), float(plain_V[found])),
        found_logits=(float(other_V[expected]), float(other_V[found])),
        gap=gap,
        deviation=deviation,
        unit=unit,
        gap_in_units=None if drawn else gap / unit,
        deviation_in_units=deviation / unit,
        drawn=drawn,
        verdict="near-tie" if explained else "not explained",
    )


def _distance_to_share(scores_V: Tensor, token: int, uniform: float) -> float:
    """How far a number is from the share of [0, 1) that belongs to a token, shares being in the order of the ids."""
    ends_V = scores_V.softmax(dim=-1).cumsum(dim=-1)
    end = float(ends_V[token])
    begin = float(ends_V[token - 1]) if token else 0.0
    return max(begin - uniform, uniform - end, 0.0)


def _new_tokens(result: GenerationResult) -> list[list[int]]:
    counts = result.num_new_tokens.tolist()
    columns = result.sequences.shape[1] - max(counts)
    rows = zip(result.sequences.tolist(), counts, strict=True)
    return [row[columns : columns + count] for row, count in rows]


def _ended(row: int, place: int, expected: int | None, found: int | None, *, drawn: bool) -> Difference:
    return Difference(
        row=row,
        position=place,
        expected=expected,
        found=found,
        expected_logits=None,
        found_logits=None,
        gap=None,
        deviation=None,
        unit=None,
        gap_in_units=None,
        deviation_in_units=None,
        drawn=drawn,
        verdict="not explained",
    )
