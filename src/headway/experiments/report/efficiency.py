"""How much text and work each run needs for the same loss, and what loss the same text and work give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headway.experiments.report.curves import BITS_PER_BYTE, Axis, Figure, first_reaching, held_out_loss, value_at
from headway.experiments.report.runs import RunRecords

AXES: tuple[Axis, ...] = ("tokens", "flops")


@dataclass(frozen=True)
class Need:
    """What one run needs on one axis.

    Attributes:
        amount: tokens or FLOPs at which it first has the common loss, between evaluations on a straight line.
        at_most: the first evaluation had it already, so that the run may have needed less.
        ratio: amount over the first run's; None where either is not exact.
    """

    amount: float
    at_most: bool
    ratio: float | None


@dataclass(frozen=True)
class SampleEfficiency:
    """Runs at equal loss and at equal budgets; everything is compared with the first run.

    Attributes:
        figure: the loss: bits per byte where every run has it, else nats per token; of offset 1, the plain model's.
        level: the best loss that every run reaches.
        runs: names of the runs with evaluations.
        best: lowest loss of each.
        needs: per axis, one for each run; None where a run does not tell that axis.
        budgets: per axis the largest amount that every run has been evaluated up to; None where a run does not tell it.
        at_budget: per axis the loss of each run there; None where its evaluations begin later.
    """

    figure: Figure
    level: float
    runs: tuple[str, ...]
    best: tuple[float, ...]
    needs: dict[Axis, tuple[Need | None, ...]]
    budgets: dict[Axis, float | None]
    at_budget: dict[Axis, tuple[float | None, ...]]


def sample_efficiency(runs: Sequence[RunRecords]) -> SampleEfficiency | None:
    """Compare the runs that have held-out losses; None where fewer than two have."""
    for figure in (BITS_PER_BYTE, held_out_loss(1)):
        told = [run for run in runs if figure.points(run, "tokens")]
        with_loss = [run for run in runs if held_out_loss(1).points(run, "tokens")]
        if len(told) >= max(2, len(with_loss)):
            break
    else:
        return None
    best = tuple(min(value for _, value in figure.points(run, "tokens")) for run in told)
    level = max(best)
    curves = {axis: [figure.points(run, axis) for run in told] for axis in AXES}
    budgets: dict[Axis, float | None] = {
        axis: min(points[-1][0] for points in lines) if all(lines) else None for axis, lines in curves.items()
    }
    at_budget: dict[Axis, tuple[float | None, ...]] = {}
    for axis, budget in budgets.items():
        lines = curves[axis]
        at_budget[axis] = tuple(None if budget is None else value_at(points, budget) for points in lines)
    return SampleEfficiency(
        figure=figure,
        level=level,
        runs=tuple(run.name for run in told),
        best=best,
        needs={axis: _needs([first_reaching(points, level) for points in lines]) for axis, lines in curves.items()},
        budgets=budgets,
        at_budget=at_budget,
    )


def _needs(reached: Sequence[tuple[float, bool] | None]) -> tuple[Need | None, ...]:
    first = reached[0]
    needs: list[Need | None] = []
    for found in reached:
        if found is None:
            needs.append(None)
            continue
        amount, exact = found
        comparable = exact and first is not None and first[1] and first[0] > 0
        needs.append(Need(amount, at_most=not exact, ratio=amount / first[0] if comparable and first else None))
    return tuple(needs)
