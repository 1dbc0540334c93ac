"""Plots of a benchmark as SVG: engine x speculation, and speed-up against batch."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from headway.experiments.bench.table import arm_figures, times
from headway.experiments.report.chart import Line, line_chart
from headway.experiments.report.style import STYLE_SHEET

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT = 760.0, 30.0, 14.0, 210.0, 190.0


def waterfall(document: Mapping[str, Any]) -> str:
    """From Hugging Face `generate` over the fastest plain engine of ours to the best draft, at the first batch.

    Returns:
        The drawing; empty where there is no headline or no Hugging Face arm.
    """
    batch = document["batches"][0]
    headline = batch["headline"]
    if headline is None or headline["best"] is None or headline["engine_gain_over_hugging_face"] is None:
        return ""
    plain, best = headline["fastest_own_plain"], headline["best"]
    # What the drafts add to the engine of ours that runs plainly: the product of the two steps is the whole.
    steps = [("hf", "Hugging Face generate"), (plain, f"engine: {plain}"), (best, f"drafts: {best}")]
    speeds = [arm_figures(batch, name)["texts_without_loops"]["tokens_per_second"] for name, _ in steps]
    if any(speed["median"] is None for speed in speeds):
        return ""
    right = max(speed["high"] for speed in speeds)
    scale = (_WIDTH - _LEFT - _RIGHT) / right
    height = len(steps) * (_BAR + _GAP) + 30
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-labelledby="waterfall-t">',
        '<title id="waterfall-t">Tokens per second: Hugging Face generate, then the engine, then drafts</title>',
    ]
    previous = 0.0
    for number, ((_, label), speed) in enumerate(zip(steps, speeds, strict=True)):
        y = number * (_BAR + _GAP) + 6
        low, high = sorted((previous, speed["median"]))
        factor = f", {times(speed['median'] / previous)}" if previous else ""
        middle = y + _BAR / 2
        parts.append(
            f'<text class="y" x="{_LEFT - 10:g}" y="{middle + 5:g}" text-anchor="end">{escape(label)}</text>'
            f'<g class="s{number}"><rect x="{_LEFT + scale * low:.1f}" y="{y:g}" '
            f'width="{max(1.0, scale * (high - low)):.1f}" height="{_BAR:g}" fill="var(--c{number})"/></g>'
            f'<path d="M{_LEFT + scale * speed["low"]:.1f} {middle:g}H{_LEFT + scale * speed["high"]:.1f}" '
            f'stroke="currentColor" stroke-width="2" fill="none"/>'
            f'<text x="{_LEFT + scale * max(high, speed["high"]) + 8:.1f}" y="{middle + 5:g}" text-anchor="start">'
            f"{speed['median']:.0f} tokens/s{factor}</text>"
        )
        previous = speed["median"]
    parts.append("</svg>")
    return "".join(parts)


def batch_chart(document: Mapping[str, Any]) -> str:
    """Speed-up of every arm that drafts over the fastest plain engine, against the batch; empty for a single batch."""
    batches = document["batches"]
    if len(batches) < 2:
        return ""
    lines = [Line(name, number, points) for number, (name, points) in enumerate(batch_curves(document))]
    if not lines:
        return ""
    return line_chart(
        lines,
        identifier="batch",
        title="Speed-up over the fastest plain engine",
        axis="rows decoded together",
        place=lambda place: f"{place:g}",
        value=times,
        tick_word=lambda tick: f"{tick:g}",
        lower_is_better=False,
    )


def batch_curves(document: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Per arm that drafts its speed-ups, on texts that do not loop where there are any, else on all."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for batch in sorted(document["batches"], key=lambda batch: int(batch["batch"])):
        for figures in batch["arms"]:
            if figures["plain"]:
                continue
            ratio = (figures["texts_without_loops"] or figures["all_texts"])["over_fastest_plain"]["median"]
            if ratio is not None:
                curves.setdefault(figures["arm"], []).append((float(batch["batch"]), ratio))
    return list(curves.items())


def standalone(drawing: str) -> str:
    """A drawing of the page as a file of its own."""
    opening, _, rest = drawing.partition(">")
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{STYLE_SHEET}</style>{rest}\n'
