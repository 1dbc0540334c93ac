"""Plots of a benchmark as SVG: engine x speculation, and speed-up against batch."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from headway.experiments.bench.table import arm_figures, times
from headway.experiments.report.chart import COLOURS, Line, line_chart
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
    first = arm_figures(batch, "hf")["texts_without_loops"]["tokens_per_second"]["median"]
    gains = (headline["engine_gain_over_hugging_face"][plain], headline["best_over_own_plain"])
    if first is None or any(gain["median"] is None for gain in gains):
        return ""
    # Each bar is the one before times a ratio within rounds; its line is the interval of that ratio.
    bars = [("Hugging Face generate", 0.0, first, first, first, f"{first:.0f} tokens/s")]
    for label, gain in zip((f"engine: {plain}", f"drafts: {best}"), gains, strict=True):
        before = bars[-1][2]
        ends = [before * gain[name] for name in ("median", "low", "high")]
        said = f"{times(gain['median'])} [{gain['low']:.2f}, {gain['high']:.2f}]"
        bars.append((label, before, *ends, said))
    scale = (_WIDTH - _LEFT - _RIGHT) / max(high for _, _, _, _, high, _ in bars)
    height = len(bars) * (_BAR + _GAP) + 6
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-labelledby="waterfall-t">',
        '<title id="waterfall-t">Tokens per second: Hugging Face generate, times the engine, times the drafts</title>',
    ]
    for number, (label, before, after, low, high, said) in enumerate(bars):
        y = number * (_BAR + _GAP) + 6
        left, right, middle = min(before, after), max(before, after), y + _BAR / 2
        parts.append(
            f'<text class="y" x="{_LEFT - 10:g}" y="{middle + 5:g}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{_LEFT + scale * left:.1f}" y="{y:g}" width="{max(1.0, scale * (right - left)):.1f}" '
            f'height="{_BAR:g}" fill="var(--c{number})"/>'
            f'<path d="M{_LEFT + scale * low:.1f} {middle:g}H{_LEFT + scale * high:.1f}" stroke="currentColor" '
            f'stroke-width="2" fill="none"/>'
            f'<text x="{_LEFT + scale * max(right, high) + 8:.1f}" y="{middle + 5:g}" text-anchor="start">'
            f"{escape(said)}</text>"
        )
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
    """Speed-ups of the arms that draft, on texts that do not loop where there are any, else on all.

    No more curves than there are colours: those that are fastest somewhere come first.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for batch in sorted(document["batches"], key=lambda batch: int(batch["batch"])):
        for figures in batch["arms"]:
            if figures["plain"] or figures["other_model"]:
                continue
            ratio = (figures["texts_without_loops"] or figures["all_texts"])["over_fastest_plain"]["median"]
            if ratio is not None:
                curves.setdefault(figures["arm"], []).append((float(batch["batch"]), ratio))
    best = sorted(curves.items(), key=lambda curve: -max(ratio for _, ratio in curve[1]))
    return best[:COLOURS]


def standalone(drawing: str) -> str:
    """A drawing of the page as a file of its own."""
    opening, _, rest = drawing.partition(">")
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{STYLE_SHEET}</style>{rest}\n'
