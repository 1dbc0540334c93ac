"""The comparison as a page of Markdown and two drawings."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headway.experiments.heads.measure import UNTRAINED
from headway.experiments.heads.result import HeadsResult, Spread

_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#ef4444", "#14b8a6", "#a3a3a3")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def report_page(result: HeadsResult) -> str:
    """The whole page."""
    training = result.settings["training"]
    machine = result.provenance["machine"]
    tokens = training["steps"] * training["batch_size"] * training["gradient_accumulation_steps"]
    parts = [
        "# Head architectures at equal steps",
        f"{len(result.variants)} variants, seeds {', '.join(map(str, result.seeds))}; {training['steps']} steps of "
        f"{training['batch_size']} x {training['sequence_length']} tokens "
        f"({tokens * training['sequence_length']:,} in all) of {', '.join(training['data'])}; width "
        f"{training['hidden_size']}, {training['num_layers']} layers {_which_layers(result)}; every seed has one "
        f"order of the data for all variants. Held-out: {result.held_out_tokens:,} tokens. {machine['cpu']}, "
        f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}.",
        _verdict(result),
        "## What they learn",
        f"Held-out loss in nats of each offset; tokens per forward of the first block that the decoder writes after each of "
        f"{result.settings['evaluation']['block_prompts']} held-out prompts (loop-free: the text is real up to there); drafts "
        f"accepted among those whose earlier offsets were; tokens per forward of a walk along the held-out text itself. Mean "
        f"over seeds +- standard deviation. Heads marked * are told the tokens between a position and their offset: their "
        f"losses from offset 2 on and their walk are of an easier task, not to be compared with those of the others; the "
        f"first block is.",
        _table(*_learned(result)),
        _drawing("loss.svg", "Held-out loss of every offset"),
        _drawing("acceptance.svg", "Loop-free tokens per forward"),
        "## Against untrained heads",
        "The same trained base with heads of the same architecture that were never trained: with their own weights from "
        "before the first step, and with copies of the base's weights. Margin: nats by which the trained heads beat the "
        "better of both, at the offset and seed where they do least. Where the heads are part of the next-token path, "
        "untrained ones break the next token too, and there is no acceptance to compare with.",
        _table(*_controls(result)),
        "## What they cost",
        f"Bytes read by one step at batch 1, float32, {result.settings['evaluation']['context_tokens']} tokens of context: "
        "weights as often as they are read, and the cache. Speeds of all variants taking turns, medians of rounds; "
        "'forward' is the time of a forward that verifies and drafts over that of a plain one, and the last column is "
        "what this makes of the loop-free acceptance.",
        _table(*_costs(result)),
        "## Checks",
        "Greedy decoding with drafts beside plain decoding, and every kept key and value beside one forward over the "
        "written text (float64; the largest difference over the largest value).",
        _table(*_checks(result)),
    ]
    return "\n\n".join(parts) + "\n"


def _which_layers(result: HeadsResult) -> str:
    if result.settings["training"]["shorten_trunk"]:
        return "in all, those of heads taken from the trunk (the paper's parity rule)"
    return "and those of heads on top of them"


def _verdict(result: HeadsResult) -> str:
    rows = sum(variant.lossless_rows for variant in result.variants)
    same = sum(variant.identical_rows for variant in result.variants)
    ties = sum(variant.near_ties for variant in result.variants)
    margins = [variant.margin_over_untrained for variant in result.variants if variant.untrained_nats]
    margin = f"; trained heads beat untrained ones by {min(margins):.2f} nats at least" if margins else ""
    right = "all caches are right" if all(variant.caches_right for variant in result.variants) else "CACHES ARE WRONG"
    return (
        f"{same} of {rows} decoded texts are those of plain decoding, token for token"
        f"{f', {ties} part at a near-tie' if ties else ''}; {right}{margin}."
    )


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _learned(result: HeadsResult) -> Table:
    offsets = max(len(variant.nats) for variant in result.variants)
    rows = []
    for variant in result.variants:
        nats = [_with_deviation(value, 3) for value in variant.nats]
        rates = [_percent(value.mean) for value in variant.acceptance_rate]
        rows.append(
            (
                f"{variant.name} *" if variant.reads_tokens else variant.name,
                *_padded(nats, offsets),
                _with_deviation(variant.acceptance_length, 3) if variant.acceptance_rate else "",
                *_padded(rates, offsets - 1),
                _with_deviation(variant.walk_length, 3) if variant.acceptance_rate else "",
            )
        )
    columns = (
        "heads",
        *(f"nats {offset}" for offset in range(1, offsets + 1)),
        "tokens per forward",
        *(f"accepted {offset}" for offset in range(2, offsets + 1)),
        "walk",
    )
    return columns, rows


def _controls(result: HeadsResult) -> Table:
    rows = []
    for variant in result.variants:
        if not variant.untrained_nats:
            continue
        cells = []
        for kind in UNTRAINED:
            last = variant.untrained_nats[kind][-1]
            cells += [_number(last.mean, 2), _number(variant.untrained_acceptance_length[kind].mean, 3)]
        rows.append(
            (
                variant.name,
                _number(variant.nats[-1].mean, 2),
                _number(variant.acceptance_length.mean, 3),
                *cells,
                _number(variant.margin_over_untrained, 2),
            )
        )
    columns = (
        "heads",
        "nats of the last offset",
        "tokens per forward",
        "before the first step: nats",
        "tokens per forward",
        "copies: nats",
        "tokens per forward",
        "margin",
    )
    return columns, rows


def _costs(result: HeadsResult) -> Table:
    rows: list[tuple[str, ...]] = []
    for variant in result.variants:
        decoding = variant.decoding
        fast = decoding.get("self_speculative")
        rows.append(
            (
                variant.name,
                f"{variant.parameters:,}",
                f"{variant.head_parameters:,}",
                _mebibytes(variant.bytes_plain),
                _mebibytes(variant.bytes_drafted) if fast else "",
                f"{variant.training_tokens_per_second:,.0f}",
                f"{decoding['plain']['tokens_per_second']:.0f}",
                f"{fast['tokens_per_second']:.0f}" if fast else "",
                f"{decoding['forward_cost']:.2f}" if fast else "",
                f"{variant.speedup_at_loop_free_acceptance:.2f}x" if fast else "",
            )
        )
    columns = (
        "heads",
        "parameters",
        "of heads",
        "plain step, MiB",
        "drafting step, MiB",
        "training tokens/s",
        "plain tokens/s",
        "drafting tokens/s",
        "forward",
        "speed-up at loop-free acceptance",
    )
    return columns, rows


def _checks(result: HeadsResult) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            variant.name,
            f"{variant.identical_rows} of {variant.lossless_rows}",
            str(variant.near_ties),
            str(variant.cached_head_layers),
            f"{variant.caches_relative:.1e}",
            "yes" if variant.caches_right else "NO",
        )
        for variant in result.variants
    ]
    return ("heads", "texts identical", "near-ties", "cached head layers", "cache difference", "right"), rows


def loss_figure(result: HeadsResult) -> str:
    """Held-out loss of every offset, one group of dots per variant, a dot per seed."""
    return _dots(
        result,
        {
            f"offset {offset}": [
                (row, variant.nats[offset - 1].values)
                for row, variant in enumerate(result.variants)
                if offset <= len(variant.nats)
            ]
            for offset in range(1, max(len(variant.nats) for variant in result.variants) + 1)
        },
        label="held-out nats (a dot per seed)",
        salt="heads-loss",
    )


def acceptance_figure(result: HeadsResult) -> str:
    """Loop-free tokens per forward, trained and untrained heads, a dot per seed."""
    with_heads = [(row, variant) for row, variant in enumerate(result.variants) if variant.acceptance_rate]
    series = {"trained": [(row, variant.acceptance_length.values) for row, variant in with_heads]}
    for kind, name in (("start", "before the first step"), ("copy", "untrained copies")):
        series[name] = [
            (row, variant.untrained_acceptance_length[kind].values)
            for row, variant in with_heads
            if not math.isnan(variant.untrained_acceptance_length[kind].mean)
        ]
    return _dots(result, series, label="loop-free tokens per forward (a dot per seed)", salt="heads-acceptance")


FIGURES: Mapping[str, Callable[[HeadsResult], str]] = {
    "loss.svg": loss_figure,
    "acceptance.svg": acceptance_figure,
}
"""File names of the drawings beside the page, and what draws them."""


def _dots(
    result: HeadsResult, series: Mapping[str, Sequence[tuple[int, Sequence[float]]]], *, label: str, salt: str
) -> str:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        # A Figure of its own, not pyplot's: no window system and no state that outlives the call.
        figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(result.variants)), layout="constrained")
        axes: Axes = figure.subplots()
        for colour, (name, points) in zip(_COLOURS, series.items(), strict=False):
            xs = [value for _, values in points for value in values]
            ys = [row for row, values in points for _ in values]
            axes.scatter(xs, ys, s=22, color=colour, alpha=0.75, linewidths=0, label=name)
        axes.set_yticks(range(len(result.variants)), [variant.name for variant in result.variants])
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=4)
        buffer = io.StringIO()
        # A white ground: the page decides neither a dark nor a light one.
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)


def _drawing(name: str, title: str) -> str:
    return f"![{title}]({name})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _padded(cells: Sequence[str], count: int) -> list[str]:
    return [*cells, *[""] * (count - len(cells))]


def _with_deviation(value: Spread, digits: int) -> str:
    if math.isnan(value.deviation):
        return _number(value.mean, digits)
    return f"{value.mean:.{digits}f} +- {value.deviation:.{digits}f}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:.2f}"
