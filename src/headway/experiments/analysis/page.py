"""The page of an analysis: the text in shades, its figures over the text, and the sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from headway.evaluation.information import TextInformation
from headway.experiments.analysis.shading import Measure, measures
from headway.experiments.demo.page_style import STYLE_SHEET

_STYLE = """
.text { line-height: 1.75; }
.text .t { border-radius: 2px; }
.text .c { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 3px; }
.choices { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 12px; font-size: 14px; }
.plot text { fill: currentColor; font: 11px system-ui, sans-serif; }
"""
_SERIES = ("#3b82f6", "#f59e0b")

TERM_NAMES = {
    "entropy_x": "H(X)",
    "entropy_y": "H(Y)",
    "entropy_x_given_y": "H(X|Y)",
    "entropy_y_given_x": "H(Y|X)",
    "mutual_information": "I(X;Y)",
}
"""The terms of the decomposition and their symbols, in the order of the tables."""


def analysis_page(
    result: TextInformation, pieces: Sequence[str], *, model: str, share: float, provenance: Mapping[str, Any]
) -> str:
    """The whole page: no script, no font, no picture from anywhere else.

    Args:
        result: the analysis.
        pieces: printable text of each token; empty where a later token completes a character.
        model: its name.
        share: of the positions that are marked as choice points.
        provenance: of the analysis.
    """
    shown = measures(result)
    parts = [
        f"<header><h1>The next two tokens, by {escape(model)}</h1><p>X is the next token, Y the one after it. "
        f"{result.positions} positions of a text of {len(result.tokens)} tokens; all figures in nats. "
        f"{_exactness(result)}</p></header>",
        _shaded(result, pieces, shown, share),
        "<h2>Over the text</h2>",
        f"<div class='panel'>{_plot(result)}</div>",
        "<h2>H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X)</h2>",
        f"<div class='panel'>{_terms_table(result)}</div>",
        _head(result),
        f"<p class='note'>headway {escape(str(provenance['versions']['headway']))}, {escape(str(provenance['date']))}. "
        f"Definitions: Gloeckle et al. 2024 (arXiv:2404.19737), section 5.2, appendices L.2 and L.3.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>headway analyze</title>\n<style>{STYLE_SHEET}{_STYLE}{_shade_rules(shown)}</style>\n</head>\n<body>\n"
        f"<main>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _exactness(result: TextInformation) -> str:
    if result.exact:
        return f"Exact: all {result.vocabulary_size} tokens were tried at every position."
    mean = math.fsum(result.left_out) / result.positions
    return (
        f"The {result.candidates} likeliest tokens were tried at every position; they leave out {100 * mean:.2f} % of the "
        f"probability on average, {100 * max(result.left_out):.2f} % at most."
    )


def _shade_rules(shown: Sequence[Measure]) -> str:
    rules = [
        f"#m-{index}:checked ~ .text .t {{ background: color-mix(in srgb, var(--accent) "
        f"calc(var(--s{index}) * 70%), transparent); }}\n"
        f"#m-{index}:checked ~ .choices label[for=m-{index}] {{ color: var(--ink); font-weight: 650; }}"
        for index in range(len(shown))
    ]
    return "\n".join(["input.m { position: absolute; opacity: 0; }", *rules, ""])


def _shaded(result: TextInformation, pieces: Sequence[str], shown: Sequence[Measure], share: float) -> str:
    chosen = set(result.choice_points(share))
    strengths = [measure.strengths() for measure in shown]
    spans = [f"<span class='prompt'>{escape(pieces[0])}</span>"]
    for position, piece in enumerate(pieces[1 : 1 + result.positions]):
        if not piece:
            continue
        variables = ";".join(f"--s{index}:{values[position]:.2f}" for index, values in enumerate(strengths))
        title = "&#10;".join(f"{_symbol(measure)} {measure.values[position]:.3f}" for measure in shown)
        kind = "t c" if position in chosen else "t"
        spans.append(f"<span class='{kind}' style='{variables}' title='{title}'>{escape(piece)}</span>")
    spans.append(f"<span class='prompt'>{escape(''.join(pieces[1 + result.positions :]))}</span>")
    inputs = "".join(
        f"<input class='m' type='radio' name='m' id='m-{index}'{' checked' if index == 0 else ''}>"
        for index in range(len(shown))
    )
    labels = "".join(f"<label for='m-{index}'>{escape(measure.title)}</label>" for index, measure in enumerate(shown))
    return (
        f"<h2>The text</h2><p class='note'>Choose what to shade by; hover over a token for its figures. Underlined: choice "
        f"points, the {100 * share:g} % of the tokens with the largest I(X;Y).</p><div class='panel'>{inputs}"
        f"<div class='choices'>{labels}</div><pre class='text'>{''.join(spans)}</pre></div>"
    )


def _symbol(measure: Measure) -> str:
    return escape(measure.title.partition(":")[0])


def _plot(result: TextInformation, *, width: int = 1040, height: int = 220) -> str:
    """H(X) and I(X;Y) along the text."""
    series = (("H(X)", result.belief.entropy_x), ("I(X;Y)", result.belief.mutual_information))
    top = max(1e-9, *(value for _, values in series for value in values if math.isfinite(value)))
    left, bottom = 40, 24

    def x(position: int) -> float:
        return left + (width - left - 8) * position / max(1, result.positions - 1)

    def y(value: float) -> float:
        return 18 + (height - 18 - bottom) * (1 - min(value, top) / top)

    lines = [
        f"<polyline fill='none' stroke='{colour}' stroke-width='1.4' points='"
        f"{' '.join(f'{x(place):.1f},{y(value):.1f}' for place, value in enumerate(values))}'/>"
        f"<text x='{left + 8 + 70 * index}' y='12' style='fill:{colour}'>{name}</text>"
        for index, ((name, values), colour) in enumerate(zip(series, _SERIES, strict=True))
    ]
    ticks = [
        f"<line x1='{left}' x2='{width - 8}' y1='{y(value):.1f}' y2='{y(value):.1f}' stroke='currentColor' "
        f"stroke-opacity='.15'/><text x='{left - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:.1f}</text>"
        for value in (0.0, top / 2, top)
    ]
    return (
        f"<figure><svg class='plot' role='img' viewBox='0 0 {width} {height}'>{''.join(ticks)}{''.join(lines)}"
        f"<text x='{width - 8}' y='{height - 6}' text-anchor='end'>token of the text, 1 to {result.positions}</text>"
        f"</svg></figure>"
    )


def _terms_table(result: TextInformation) -> str:
    belief, observed = result.belief.means(), result.observed.means()
    rows = "".join(
        f"<tr><td>{symbol}</td><td>{belief[name]:.4f}</td><td>{observed[name]:.4f}</td></tr>"
        for name, symbol in TERM_NAMES.items()
    )
    return (
        "<table><caption>Means over the positions</caption><thead><tr><th>term</th><th>the model's own belief</th>"
        f"<th>on this text (cross-entropy)</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _head(result: TextInformation) -> str:
    head = result.second_head
    if head is None:
        return ""
    means = head.means()
    what = "p(y|x), since it is told x" if head.reads_next_token else "the marginal p(y) = sum over x of p(x) p(y|x)"
    return (
        f"<h2>What head 2 believes</h2><p class='note'>Compared with {what}.</p><div class='panel'><table class='facts'>"
        f"<tr><td>nats of head 2 on this text</td><td>{means['nats']:.4f}</td></tr>"
        f"<tr><td>nats of what it is compared with</td><td>{means['target_nats']:.4f}</td></tr>"
        f"<tr><td>divergence from it</td><td>{means['divergence']:.4f}</td></tr>"
        f"<tr><td>same likeliest token</td><td>{100 * means['agrees']:.1f} %</td></tr></table></div>"
    )
