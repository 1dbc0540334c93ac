"""Line charts as SVG: one run one colour, one dash and one mark, so that colour alone tells nothing.

Colours come from the page's style sheet (classes s0, s1, ...), so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from headway.experiments.report.curves import Point, thinned

COLOURS = 8
_WIDTH, _HEIGHT = 480.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 24.0, 10.0, 46.0
_DASHES = ("", "7 3", "2 3", "10 3 2 3")
_MOST_MARKS = 40
# A fall from random weights would press everything that matters against the floor.
_EARLY = 0.04


@dataclass(frozen=True)
class Line:
    """One run's curve.

    Attributes:
        name: of the run.
        number: of the run in the report, from 0; decides colour, dash and mark.
        points: in order.
    """

    name: str
    number: int
    points: Sequence[Point]


def line_chart(
    lines: Sequence[Line],
    *,
    identifier: str,
    title: str,
    axis: str,
    place: Callable[[float], str],
    value: Callable[[float], str],
    tick_word: Callable[[float], str],
    lower_is_better: bool,
) -> str:
    """An SVG drawing that names itself to readers who cannot see it.

    Args:
        lines: at least one with a point.
        identifier: unlike that of every other chart of the page.
        title: what is drawn.
        axis: name of the horizontal axis.
        place: a place on the horizontal axis in words.
        value: a value in words.
        tick_word: a round value in words, for the vertical axis.
        lower_is_better: for losses, whose first fall may leave the frame at the top.
    """
    drawn = [Line(line.name, line.number, thinned(line.points)) for line in lines if line.points]
    right = max(x for line in drawn for x, _ in line.points) or 1.0
    low, high = _range(drawn, right, lower_is_better=lower_is_better)
    ticks_y, ticks_x = ticks(low, high), ticks(0.0, right)
    low, high = min(low, ticks_y[0]), max(high, ticks_y[-1])

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / right

    def down(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    floor, end = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-labelledby="{identifier}-t {identifier}-d">',
        f'<title id="{identifier}-t">{escape(title)} over {escape(axis)}</title>',
        f'<desc id="{identifier}-d">{escape(_description(drawn, place=place, value=value))}</desc>',
        f'<clipPath id="{identifier}-c"><rect x="{_LEFT:g}" y="{_TOP - 4:g}" width="{end - _LEFT + 6:g}" '
        f'height="{floor - _TOP + 8:g}"/></clipPath>',
    ]
    for tick in ticks_y:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{end:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7:g}" y="{y + 4.5:.1f}">{escape(tick_word(tick))}</text>')
    for tick in ticks_x:
        parts.append(f'<text class="x" x="{across(tick):.1f}" y="{floor + 18:g}">{escape(place(tick))}</text>')
    parts.append(f'<line class="base" x1="{_LEFT:g}" x2="{end:g}" y1="{floor:g}" y2="{floor:g}"/>')
    parts.append(f'<text class="axis" x="{(_LEFT + end) / 2:g}" y="{_HEIGHT - 8:g}">{escape(axis)}</text>')
    parts.append(f'<g clip-path="url(#{identifier}-c)">')
    for line in drawn:
        parts.append(_curve(line, across=across, down=down, place=place, value=value))
    parts.append("</g></svg>")
    return "".join(parts)


def key(name: str, number: int) -> str:
    """A short piece of a run's line with its name, for a legend."""
    return (
        f'<span class="key s{number % COLOURS}"><svg viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="curve" d="M1 6H33" stroke-dasharray="{_DASHES[number % len(_DASHES)]}"/>{_mark(number, 17, 6)}</svg>'
        f"{escape(name)}</span>"
    )


def ticks(low: float, high: float, *, wanted: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least near `high`.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(3.0, 3.0)
    [3.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1.0, 2.0, 2.5, 5.0, 10.0) if size * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _range(drawn: Sequence[Line], right: float, *, lower_is_better: bool) -> tuple[float, float]:
    values = [y for line in drawn for _, y in line.points]
    low, high = min(values), max(values)
    if lower_is_better:
        later = [y for line in drawn if len(line.points) > 4 for x, y in line.points if x >= _EARLY * right]
        few = [y for line in drawn if len(line.points) <= 4 for _, y in line.points]
        high = max(later + few, default=high)
    margin = 0.04 * (high - low) or 0.02 * abs(high) or 0.5
    return low - margin if low - margin > 0 or low < 0 else 0.0, high + margin


def _curve(
    line: Line,
    *,
    across: Callable[[float], float],
    down: Callable[[float], float],
    place: Callable[[float], str],
    value: Callable[[float], str],
) -> str:
    path = "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in line.points)
    every = max(1, -(-len(line.points) // _MOST_MARKS))
    marks = [
        f"<g>{_mark(line.number, across(x), down(y))}"
        f"<title>{escape(f'{line.name}: {value(y)} at {place(x)}')}</title></g>"
        for index, (x, y) in enumerate(line.points)
        if index % every == 0 or index == len(line.points) - 1
    ]
    return (
        f'<g class="s{line.number % COLOURS}"><path class="curve" d="{path}" '
        f'stroke-dasharray="{_DASHES[line.number % len(_DASHES)]}"/>{"".join(marks)}</g>'
    )


def _mark(number: int, x: float, y: float) -> str:
    match number % 4:
        case 0:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
        case 1:
            return f'<path d="M{x - 2.5:.1f} {y - 2.5:.1f}h5v5h-5z"/>'
        case 2:
            return f'<path d="M{x:.1f} {y - 3.4:.1f}l3.4 5.8h-6.8z"/>'
        case _:
            return f'<path d="M{x:.1f} {y - 3.5:.1f}l3.5 3.5l-3.5 3.5l-3.5 -3.5z"/>'


def _description(drawn: Sequence[Line], *, place: Callable[[float], str], value: Callable[[float], str]) -> str:
    return "; ".join(
        f"{line.name}: from {value(line.points[0][1])} at {place(line.points[0][0])} to {value(line.points[-1][1])} at "
        f"{place(line.points[-1][0])}"
        for line in drawn
    )
