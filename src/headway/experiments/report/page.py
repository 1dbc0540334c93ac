"""The page: one HTML file without scripts that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from headway.experiments.report.chart import Line, key, line_chart
from headway.experiments.report.curves import ACCEPTANCE, HELD_OUT_LOSS, TRAINING, Axis, Figure, figures
from headway.experiments.report.efficiency import SampleEfficiency
from headway.experiments.report.runs import RunRecords
from headway.experiments.report.style import STYLE_SHEET
from headway.experiments.report.tables import (
    Table,
    amount,
    decimals,
    efficiency_table,
    final_table,
    option_table,
    share,
    warnings,
)

_AXES: dict[Axis, str] = {"tokens": "training tokens", "flops": "training FLOPs"}
_NOTES = {
    HELD_OUT_LOSS: "Offset 1 is the next token, the plain model's own loss; offset 2 the one after it, and so on.",
    ACCEPTANCE: (
        "Tokens per forward counts the next token, so it lies between 1 and n. Along held-out text the drafts are checked "
        "against text that the model did not write; the decoder checks them on its own text, which may repeat itself and "
        "then flatters."
    ),
    TRAINING: "Of the batches trained on, without smoothing; long curves are means of neighbouring steps.",
}


def report_page(
    runs: Sequence[RunRecords], efficiency: SampleEfficiency | None, *, title: str, date: str, command: str
) -> str:
    """The whole page.

    Args:
        runs: at least one; what is compared is compared with the first.
        efficiency: of the runs; None where fewer than two have held-out losses.
        title: of the page.
        date: when it was made.
        command: that made it.
    """
    shown = figures(runs)
    axes = [axis for axis in _AXES if any(figure.points(run, axis) for figure in shown for run in runs)]
    inputs = "".join(
        f'<input class="axis-input" type="radio" name="axis" id="axis-{axis}"{" checked" if axis == axes[0] else ""}>'
        for axis in axes
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n{inputs}\n<main>\n"
        + "\n".join(_parts(runs, shown, axes, efficiency, title=title))
        + f"\n<footer><p>Made {escape(date)} by <code>{escape(command)}</code>. FLOPs are those of the model, forward and "
        "backward, heads and their unembeddings counted; MFU is their rate over the peak of the devices.</p></footer>"
        "\n</main>\n</body>\n</html>\n"
    )


def _parts(
    runs: Sequence[RunRecords],
    shown: Sequence[Figure],
    axes: Sequence[Axis],
    efficiency: SampleEfficiency | None,
    *,
    title: str,
) -> Iterator[str]:
    compared = "" if len(runs) == 1 else f" Differences are from the first run, {escape(runs[0].name)}."
    yield f"<header><h1>{escape(title)}</h1><p>{_count(len(runs), 'training run')}.{compared}</p></header>"
    if said := warnings(runs):
        yield f'<ul class="warnings">{"".join(f"<li>{escape(text)}</li>" for text in said)}</ul>'
    if efficiency is not None:
        yield (
            "<h2>Sample efficiency</h2>"
            f'<p class="note">The best loss that every run reaches is {decimals(efficiency.level)} '
            f"{escape(efficiency.figure.unit)}, on held-out text. How much training each run needed to reach it, between two "
            "evaluations on a straight line; and what each had reached where the shortest run ended.</p>"
            f'<div class="panel">{_table(efficiency_table(efficiency))}</div>'
        )
    yield f'<h2>Newest figures</h2><div class="panel">{_table(final_table(runs))}</div>'
    if (options := option_table(runs)) is not None:
        yield f'<div class="panel">{_table(options)}</div>'
    if not axes:
        return
    legend = "".join(key(run.name, number) for number, run in enumerate(runs))
    choice = ""
    if len(axes) > 1:
        labels = "".join(f'<label for="axis-{axis}">{escape(_AXES[axis])}</label>' for axis in axes)
        choice = f'<span class="choice">{labels}</span>'
    yield f'<h2>Curves</h2><div class="bar">{legend}{choice}</div>'
    for section, group in groupby(shown, key=lambda figure: figure.section):
        note = f'<p class="note">{_NOTES[section]}</p>' if section in _NOTES else ""
        members = list(group)
        yield f"<h2>{escape(section)}</h2>{note}"
        for axis in axes:
            drawn = "".join(chart for figure in members if (chart := _chart(runs, figure, axis)))
            heading = f'<p class="note">Over {_AXES[axis]}.</p>'
            yield f'<div class="by-{axis}">{heading}<div class="charts">{drawn}</div></div>'


def _chart(runs: Sequence[RunRecords], figure: Figure, axis: Axis) -> str:
    lines = [Line(run.name, number, figure.points(run, axis)) for number, run in enumerate(runs)]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    value = share if figure.share else decimals
    newest = "".join(f"<li>{escape(line.name)} <b>{escape(value(line.points[-1][1]))}</b></li>" for line in lines)
    drawing = line_chart(
        lines,
        identifier=f"{axis}-{re.sub('[^a-z0-9]+', '-', f'{figure.section} {figure.title}'.lower())}",
        title=figure.title,
        axis=_AXES[axis],
        place=amount,
        value=value,
        tick_word=_percent_tick if figure.share else _tick,
        lower_is_better=figure.lower_is_better,
    )
    unit = f"<small>{escape(figure.unit)}</small>" if figure.unit and not figure.share else ""
    return f"<figure><figcaption>{escape(figure.title)} {unit}<ul>{newest}</ul></figcaption>{drawing}</figure>"


def _tick(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else amount(value)


def _percent_tick(value: float) -> str:
    return f"{100 * value:.4g} %"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(_cell(cell) for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return f"<table><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: str) -> str:
    figure, _, remark = cell.partition("\n")
    long = ' class="long"' if len(figure) > 24 else ""
    return f"<td{long}>{escape(figure)}{f'<small>{escape(remark)}</small>' if remark else ''}</td>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
