"""Curves over training tokens and over training FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from headway.experiments.report.runs import RunRecords, number

Axis = Literal["tokens", "flops"]
Point = tuple[float, float]

MOST_POINTS = 160
"""Longer curves are drawn as means of neighbouring points."""


@dataclass(frozen=True)
class Figure:
    """Something that is drawn for every run.

    Attributes:
        section: heading under which it stands.
        title: what it is.
        unit: of the values.
        key: name of the field in the lines.
        index: item of a list; None for a single number.
        training: whether the field is in metrics.jsonl; else it is in evaluations.jsonl.
        lower_is_better: for losses.
        share: values between 0 and 1, shown in percent.
    """

    section: str
    title: str
    unit: str
    key: str
    index: int | None = None
    training: bool = False
    lower_is_better: bool = False
    share: bool = False

    def value(self, record: dict[str, Any]) -> float | None:
        """The figure of one line; None where the line has none."""
        found = record.get(self.key)
        if self.index is not None:
            found = found[self.index] if isinstance(found, list) and len(found) > self.index else None
        return number(found)

    def last(self, run: RunRecords) -> float | None:
        """The figure of the newest line that has it."""
        values = [value for record in self._lines(run) if (value := self.value(record)) is not None]
        return values[-1] if values else None

    def points(self, run: RunRecords, axis: Axis) -> list[Point]:
        """Values over an axis, in order; empty where the run tells either of them nowhere."""
        return [
            (place, value)
            for record in self._lines(run)
            if (place := number(record.get(axis))) is not None and (value := self.value(record)) is not None
        ]

    def _lines(self, run: RunRecords) -> Sequence[dict[str, Any]]:
        return run.steps if self.training else run.evaluations


HELD_OUT_LOSS, ACCURACY, ACCEPTANCE, TRAINING = "Held-out loss", "Held-out accuracy", "Acceptance", "Training"


def figures(runs: Sequence[RunRecords]) -> list[Figure]:
    """Everything that at least one of the runs tells."""
    return [figure for figure in _candidates(runs) if any(figure.last(run) is not None for run in runs)]


def held_out_loss(offset: int) -> Figure:
    """Held-out loss of an offset."""
    return Figure(
        HELD_OUT_LOSS, f"Held-out loss, offset {offset}", "nats per token", "nats", offset - 1, lower_is_better=True
    )


BITS_PER_BYTE = Figure(
    HELD_OUT_LOSS, "Held-out bits per byte, offset 1", "bits per byte", "bits_per_byte", 0, lower_is_better=True
)


def _candidates(runs: Sequence[RunRecords]) -> Iterator[Figure]:
    offsets = range(1, max(run.num_future_tokens or 1 for run in runs) + 1)
    yield held_out_loss(1)
    yield BITS_PER_BYTE
    for offset in offsets[1:]:
        yield held_out_loss(offset)
    for offset in offsets:
        yield Figure(ACCURACY, f"Held-out accuracy, offset {offset}", "%", "accuracy", offset - 1, share=True)
    yield Figure(ACCEPTANCE, "Tokens per forward along held-out text", "tokens", "walk_acceptance_length")
    yield Figure(ACCEPTANCE, "Tokens per forward, decoding", "tokens", "decoded_acceptance_length")
    for offset in offsets[1:]:
        title = f"Drafts of offset {offset} accepted, the earlier ones given"
        yield Figure(ACCEPTANCE, title, "%", "walk_acceptance_rate", offset - 2, share=True)
    yield Figure(
        TRAINING,
        "Training loss, offset 1",
        "nats per token",
        "loss_per_offset",
        0,
        training=True,
        lower_is_better=True,
    )
    yield Figure(TRAINING, "Gradient norm", "", "gradient_norm", training=True)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: means of groups of neighbours, the first and the last as they are.

    >>> len(thinned([(float(x), 0.0) for x in range(1000)]))
    160
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    inner, groups = points[1:-1], MOST_POINTS - 2
    means = []
    for group in range(groups):
        part = inner[group * len(inner) // groups : (group + 1) * len(inner) // groups]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [points[0], *means, points[-1]]


def first_reaching(points: Sequence[Point], level: float) -> tuple[float, bool] | None:
    """Where a falling curve first comes down to a level, between points on a straight line.

    >>> first_reaching([(10.0, 3.0), (20.0, 1.0)], 2.0), first_reaching([(10.0, 3.0)], 2.0)
    ((15.0, True), None)

    Returns:
        The place, and whether it lies between two points; False where the first point is there already, so that the curve
        came down before. None where it never does.
    """
    for place, (x, y) in enumerate(points):
        if y <= level:
            if place == 0:
                return x, False
            before_x, before_y = points[place - 1]
            return before_x + (x - before_x) * (before_y - level) / (before_y - y), True
    return None


def value_at(points: Sequence[Point], place: float) -> float | None:
    """The curve's height at a place between its ends, on straight lines between points; None outside.

    >>> value_at([(10.0, 3.0), (20.0, 1.0)], 12.5)
    2.5
    """
    for (left, before), (right, after) in pairwise(points):
        if left <= place <= right:
            return before + (after - before) * (place - left) / (right - left) if right > left else after
    return points[0][1] if len(points) == 1 and points[0][0] == place else None
