"""The tables of the demo: the same rows for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from headway.evaluation.acceptance import WalkAcceptance
from headway.evaluation.likelihood import OffsetLikelihood
from headway.evaluation.speed import DecodingSpeed
from headway.experiments.demo.generation import GeneratedAcceptance


@dataclass(frozen=True)
class FigureTable:
    """A small table of figures.

    Attributes:
        title: what it shows, with its conditions.
        columns: headings; the first column is text, the others are figures.
        rows: cells as text.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def likelihood_table(likelihood: OffsetLikelihood) -> FigureTable:
    """Held-out loss and accuracy of every offset."""
    bits = likelihood.bits_per_byte or (math.nan,) * len(likelihood.nats)
    return FigureTable(
        title=f"Held-out text, {likelihood.num_targets[0]:,} targets at offset 1",
        columns=("offset", "nats per byte", "bits per byte", "accuracy"),
        rows=tuple(
            (str(offset), number(nats, 3), number(bit, 3), percent(accuracy))
            for offset, (nats, bit, accuracy) in enumerate(
                zip(likelihood.nats, bits, likelihood.accuracy, strict=True), start=1
            )
        ),
    )


def acceptance_table(walk: WalkAcceptance, generated: GeneratedAcceptance) -> FigureTable:
    """Acceptance along real text and, apart from it, on generated text."""
    offsets = range(2, len(walk.acceptance_rate) + 2)
    return FigureTable(
        title=f"Acceptance (1 to {walk.num_draft_tokens + 1} tokens per forward pass)",
        columns=(
            "text",
            "tokens per forward",
            *(f"offset {offset}" for offset in offsets),
            "distinct 8-grams",
        ),
        rows=(
            (
                "held-out (loop-free)",
                number(walk.mean_acceptance_length, 2),
                *(percent(rate) for rate in walk.acceptance_rate),
                "",
            ),
            (
                "generated",
                number(generated.tokens_per_forward, 2),
                *(percent(rate) for rate in generated.blocks.acceptance_rate),
                percent(generated.distinct_8grams),
            ),
        ),
    )


def speed_table(speed: DecodingSpeed) -> FigureTable:
    """Tokens per second of every arm, and how it compares with plain decoding."""
    plain = speed.arm("plain").rounds
    rows = []
    for arm in speed.arms:
        ratios = sorted(mine / theirs for mine, theirs in zip(arm.rounds, plain, strict=True))
        rows.append(
            (
                arm.name,
                number(arm.tokens_per_forward, 2),
                number(arm.tokens_per_second, 0),
                f"{min(arm.rounds):.0f} to {max(arm.rounds):.0f}",
                f"{ratios[len(ratios) // 2]:.2f}x",
                f"{ratios[0]:.2f}x to {ratios[-1]:.2f}x",
            )
        )
    return FigureTable(
        title=(
            f"Decoding speed: batch 1, {speed.dtype}, threads {speed.threads}, median of {speed.repeats} interleaved "
            f"rounds, prefill included"
        ),
        columns=("decoding", "tokens per forward", "tokens/s", "range", "over plain", "range of rounds"),
        rows=tuple(rows),
    )


def speed_note(speed: DecodingSpeed, walk: WalkAcceptance) -> str:
    """What the measured cost of a forward pass makes of the loop-free acceptance."""
    return (
        f"One self-speculative forward pass costs {speed.forward_cost:.2f} plain ones: at the loop-free "
        f"{number(walk.mean_acceptance_length, 2)} tokens per forward that is "
        f"{number(speed.speedup_at(walk.mean_acceptance_length), 2)}x."
    )


def time_table(seconds: Mapping[str, float]) -> FigureTable:
    """Wall time of each part of the demo."""
    return FigureTable(
        title="Time of each part",
        columns=("part", "seconds"),
        rows=tuple((name, number(value, 1)) for name, value in seconds.items()),
    )


def rich_table(table: FigureTable) -> Group:
    """The table for a terminal, its title above it."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in table.rows:
        drawn.add_row(*row)
    return Group(Text(table.title, style="bold"), drawn)


def number(value: float, digits: int) -> str:
    """The value with that many decimals, or a dash where it was never measured.

    >>> number(1.234, 2), number(float("nan"), 2)
    ('1.23', '-')
    """
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A share in percent, or a dash where it was never measured.

    >>> percent(0.4567)
    '45.7 %'
    """
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"
