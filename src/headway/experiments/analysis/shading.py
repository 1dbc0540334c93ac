"""Figures of an analysis as shades of the text's tokens, for a terminal and for a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from headway.evaluation.information import TextInformation

TERMINAL_STYLES = (
    "",
    "black on #dbeafe",
    "black on #93c5fd",
    "black on #60a5fa",
    "white on #2563eb",
    "white on #1e3a8a",
)
"""From nothing to the strongest shade, legible on a dark and on a light ground."""

# Of the positions; beyond it all have the strongest shade, so that one large figure does not fade all others.
_SATURATED = 0.02


@dataclass(frozen=True)
class Measure:
    """A figure of every position that a text can be shaded by.

    Attributes:
        name: on the command line.
        title: in words.
        values: one per position.
    """

    name: str
    title: str
    values: tuple[float, ...]

    def strengths(self) -> list[float]:
        """Each value over nearly the largest, 0 to 1."""
        return strengths(self.values)


def measures(result: TextInformation) -> list[Measure]:
    """What there is to shade by; position i belongs to token i + 1, the token X that was chosen there."""
    found = [
        Measure("information", "I(X;Y): how much this token decides what follows", result.belief.mutual_information),
        Measure("uncertainty", "H(X): how open this token was", result.belief.entropy_x),
        Measure("surprise", "-log q(x): how unexpected this token was", result.observed.entropy_x),
        Measure("sigma", "sigma: how much of what follows this token leaves open or settles", result.value_deviation),
    ]
    if result.second_head is not None:
        what = "p(y|x)" if result.second_head.reads_next_token else "the marginal p(y)"
        title = f"D({what} || head 2): how far off head 2 was about the next token"
        found.append(Measure("head", title, result.second_head.divergence))
    return found


MEASURE_NAMES = ("information", "uncertainty", "surprise", "sigma", "head")
"""Names of all measures; a model without heads lacks the last."""


def strengths(values: Sequence[float]) -> list[float]:
    """Values over nearly the largest of them, 0 to 1; infinities count as the largest.

    >>> strengths([0.0, 1.0, 2.0])
    [0.0, 0.5, 1.0]
    """
    finite = sorted(value for value in values if math.isfinite(value))
    top = finite[len(finite) - 1 - int(_SATURATED * len(finite))] if finite else 0.0
    return [min(1.0, max(0.0, value / top)) if math.isfinite(value) and top > 0 else float(top > 0) for value in values]


def shaded_text(pieces: Sequence[str], measure: Measure, choice_points: Sequence[int], *, colours: bool) -> Text:
    """The text for a terminal: shaded where there are colours, choice points underlined, else [in brackets].

    Args:
        pieces: printable text of each token; empty where a later token completes a character.
        measure: what to shade by.
        choice_points: positions to mark.
        colours: whether the terminal shows them.
    """
    chosen = set(choice_points)
    text = Text(pieces[0])
    for position, (piece, strength) in enumerate(zip(pieces[1:], measure.strengths(), strict=False)):
        if not colours:
            text.append(f"[{piece}]" if position in chosen else piece)
            continue
        style = TERMINAL_STYLES[round(strength * (len(TERMINAL_STYLES) - 1))]
        mark = "bold underline" if position in chosen else ""
        # A line feed has no background of its own: a blank before it has.
        text.append(piece.replace("\n", " \n") if style else piece, style=f"{style} {mark}".strip())
    text.append("".join(pieces[1 + len(measure.values) :]))
    return text
