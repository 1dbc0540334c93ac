"""Drawings of the reference model: its curves, and loss against speed."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CURVES = (Path("reference") / "curve-loss.svg", Path("reference") / "curve-acceptance.svg")
TRADE_OFF = "reference-trade-off.svg"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#ef4444", "#14b8a6", "#a3a3a3")


def loss_curve(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Held-out bits per byte of every offset over the bytes trained on."""

    def draw(axes: Axes) -> None:
        tokens = [record["tokens"] / 1e6 for record in evaluations]
        for index in range(len(evaluations[-1]["bits_per_byte"])):
            values = [record["bits_per_byte"][index] for record in evaluations]
            axes.plot(tokens, values, color=_COLOURS[index % 8], marker="o", markersize=3, label=f"offset {index + 1}")
        axes.set_xlabel("million bytes trained on")
        axes.set_ylabel("held-out bits per byte")
        axes.legend(ncols=2)

    return _svg(draw, salt="reference-loss")


def acceptance_curve(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per forward along held-out text over the bytes trained on, as the run itself evaluated it."""

    def draw(axes: Axes) -> None:
        tokens = [record["tokens"] / 1e6 for record in evaluations]
        values = [record["walk_acceptance_length"] for record in evaluations]
        axes.plot(tokens, values, color=_COLOURS[0], marker="o", markersize=3)
        axes.set_xlabel("million bytes trained on")
        axes.set_ylabel("tokens per forward along held-out text")

    return _svg(draw, salt="reference-acceptance")


def trade_off(points: Sequence[tuple[str, str, float, float]]) -> str:
    """Bits per byte against tokens per second: down and to the right is better.

    Args:
        points: (model, arm, tokens per second, bits per byte); those of one model are joined.
    """

    def draw(axes: Axes) -> None:
        for number, model in enumerate(dict.fromkeys(point[0] for point in points)):
            own = sorted((point for point in points if point[0] == model), key=lambda point: point[2])
            colour = _COLOURS[number % 8]
            axes.plot([point[2] for point in own], [point[3] for point in own], color=colour, marker="o", label=model)
            for _, arm, speed, bits in own:
                axes.annotate(arm, (speed, bits), textcoords="offset points", xytext=(4, 6), fontsize=8, color=colour)
        axes.set_xlabel("tokens per second, batch 1 (log scale)")
        axes.set_xscale("log")
        axes.set_ylabel("held-out bits per byte")
        axes.margins(0.15)
        axes.legend()

    return _svg(draw, salt="reference-trade-off")


def _svg(draw: Callable[[Axes], None], *, salt: str) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        # A Figure of its own, not pyplot's: no window system and no state that outlives the call.
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes: Axes = figure.subplots()
        axes.grid(visible=True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
