"""The report's figures as SVG that can be put into a page.

Lines and words take the colour of the page's own text (`currentColor`), so that one file reads well on a
dark and on a light page; series have middle tones that stand out on both.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headway.evaluation.acceptance import WalkAcceptance
from headway.evaluation.speed import DecodingSpeed
from headway.experiments.demo.generation import GeneratedAcceptance
from headway.experiments.demo.result import CurvePoint

SERIES = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#ef4444", "#14b8a6", "#a3a3a3")
"""Colours of offset 1, 2, ..."""

_INK = "#010203"
"""Stands for the page's text colour until the SVG is written; no series may have it."""

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11.0,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}


def loss_figure(curve: Sequence[CurvePoint], held_out_nats: Sequence[float]) -> str:
    """Training loss of every offset over steps; a tick at the right end marks the held-out loss."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "loss"}):
        figure, axes = _canvas()
        steps = [point.step for point in curve]
        for index, held_out in enumerate(held_out_nats):
            colour = SERIES[index % len(SERIES)]
            values = [point.loss_per_offset[index] for point in curve]
            axes.plot(steps, values, color=colour, linewidth=1.6, label=f"offset {index + 1}")
            if steps and not math.isnan(held_out):
                axes.plot([steps[-1]], [held_out], marker="D", markersize=5, color=colour, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss in nats per byte")
        axes.set_title("Training loss per offset (diamonds: held-out text)", loc="left")
        axes.legend(ncols=2)
        return _svg(figure)


def acceptance_figure(walk: WalkAcceptance, generated: GeneratedAcceptance) -> str:
    """Acceptance of every draft offset, given the earlier ones: held-out beside generated text."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "acceptance"}):
        figure, axes = _canvas()
        kinds = (
            ("held-out text (loop-free)", walk.acceptance_rate, SERIES[0], -0.2),
            ("generated text", generated.blocks.acceptance_rate, SERIES[1], 0.2),
        )
        for label, rates, colour, shift in kinds:
            places = [offset + shift for offset in range(2, len(rates) + 2)]
            heights = [0.0 if math.isnan(rate) else 100 * rate for rate in rates]
            axes.bar(places, heights, width=0.36, color=colour, label=label)
            for place, height in zip(places, heights, strict=True):
                axes.annotate(f"{height:.0f}", (place, height), ha="center", va="bottom", fontsize=9)
        axes.set_xticks(range(2, len(walk.acceptance_rate) + 2))
        axes.set_ylim(0, 106)
        axes.set_yticks(range(0, 101, 20))
        axes.set_xlabel("offset of the draft")
        axes.set_ylabel("accepted, percent")
        axes.set_title("Acceptance per offset, given the earlier ones", loc="left")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure)


def speed_figure(speed: DecodingSpeed) -> str:
    """Tokens per second of every arm; whiskers are the slowest and the fastest round."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "speed"}):
        figure, axes = _canvas(height=2.4)
        for row, (arm, colour) in enumerate(zip(speed.arms, (SERIES[7], SERIES[0], SERIES[1]), strict=False)):
            low, high = min(arm.rounds), max(arm.rounds)
            middle = arm.tokens_per_second
            axes.barh(row, middle, color=colour, height=0.6)
            axes.plot([low, high], [row, row], color=_INK, linewidth=1.2, marker="|", markersize=8)
            axes.annotate(f"{middle:.0f}", (high, row), (8, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(speed.arms)), [arm.name for arm in speed.arms])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.15 * max(max(arm.rounds) for arm in speed.arms))
        axes.set_xlabel("tokens per second (whiskers: slowest and fastest round)")
        axes.set_title("Decoding speed, all arms taking turns", loc="left")
        return _svg(figure)


def _canvas(*, height: float = 3.4) -> tuple[Figure, Axes]:
    # A Figure of its own, not pyplot's: no window system and no state that outlives the call.
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', drawing, count=1)
    return drawing.replace(_INK, "currentColor")
