"""The figures of a benchmark in words: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

SPEED_COLUMNS = (
    "arm",
    "tokens/s",
    "over the fastest plain",
    "all texts",
    "CPU ms/token",
    "prefill ms",
    "text",
)
ACCEPTANCE_COLUMNS = (
    "arm",
    "timed texts",
    "all texts",
    "temperature 1",
    "real text",
    "breaks even at",
    "expected on real text",
)
STEP_COLUMNS = ("arm", "ms per forward", "verify", "draft", "rest", "MB read", "floor ms", "of the memory's limit")


@dataclass(frozen=True)
class WordTable:
    """A table in words.

    Attributes:
        title: above it.
        columns: names.
        rows: cells; the first names the row.
        best: number of the row to stress; None for none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None


def times(ratio: float | None) -> str:
    """A ratio in words.

    >>> times(1.5), times(None)
    ('1.50x', '-')
    """
    return "-" if ratio is None else f"{ratio:.2f}x"


def arm_figures(batch: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The figures of an arm."""
    found: Mapping[str, Any] = next(figures for figures in batch["arms"] if figures["arm"] == name)
    return found


def speed_table(batch: Mapping[str, Any]) -> WordTable:
    """Speeds of one batch size."""
    headline = batch["headline"]
    rows, best = [], None
    for number, figures in enumerate(batch["arms"]):
        counted, everything = figures["texts_without_loops"], figures["all_texts"]
        shown = counted or everything
        if headline is not None and figures["arm"] == headline["best"]:
            best = number
        rows.append(
            (
                figures["arm"],
                _with_interval(shown["tokens_per_second"], 0),
                "-" if counted is None else _with_interval(counted["over_fastest_plain"], 2, unit="x"),
                times(everything["over_fastest_plain"]["median"]),
                _number(shown["cpu_ms_per_token"]["median"], 2),
                _number(shown["prefill_ms"]["median"], 1),
                verdict(figures),
            )
        )
    return WordTable(f"Batch {batch['batch']}: {_texts(batch)}", SPEED_COLUMNS, rows, best)


def acceptance_table(batch: Mapping[str, Any]) -> WordTable | None:
    """Tokens per forward of the arms that draft, in four ways; None where none does."""
    rows = []
    for figures in batch["arms"]:
        if figures["plain"]:
            continue
        counted, everything = figures["texts_without_loops"], figures["all_texts"]
        rows.append(
            (
                figures["arm"],
                "-" if counted is None else _number(counted["tokens_per_forward"], 2),
                _number(everything["tokens_per_forward"], 2),
                _number(figures["sampled_tokens_per_forward"], 2),
                _number(figures["walk_tokens_per_forward"], 2),
                _number((counted or everything)["break_even_tokens_per_forward"], 2),
                times(figures["expected_over_fastest_plain_along_text"]),
            )
        )
    if not rows:
        return None
    return WordTable(f"Tokens per forward at batch {batch['batch']}", ACCEPTANCE_COLUMNS, rows)


def step_table(batch: Mapping[str, Any]) -> WordTable:
    """Parts of a forward of one batch size."""
    rows = []
    for figures in batch["arms"]:
        step = figures.get("step")
        if step is None:
            continue
        parts = step["parts_ms"] or {}
        share = step["share_of_bandwidth_limit"]
        rows.append(
            (
                figures["arm"],
                _number(step["ms"]["median"], 2),
                *(_number(parts.get(name), 2) for name in ("verify", "draft", "rest")),
                "-" if step["bytes"] is None else f"{step['bytes'] / 1e6:.2f}",
                _number(step["byte_floor_ms"], 2),
                "-" if share is None else f"{100 * share:.0f} %",
            )
        )
    speed = batch["read_bytes_per_second"]
    return WordTable(
        f"A forward at batch {batch['batch']}; the memory gave {_number(None if speed is None else speed / 1e9, 1)} GB/s",
        STEP_COLUMNS,
        rows,
    )


def floor_table(document: Mapping[str, Any]) -> WordTable | None:
    """Bytes that a step with each kind of heads reads at least; None where there are none."""
    rows = [
        (floor["heads"], f"{floor['bytes'] / 1e6:.2f}", times(floor["over_plain"])) for floor in document["head_floors"]
    ]
    if not rows:
        return None
    drafts = max(1, document["num_future_tokens"] - 1)
    title = f"Least bytes of a step that drafts {drafts}, by kind of heads on this base"
    return WordTable(title, ("heads", "MB read", "over a plain step"), rows)


def break_even_line(document: Mapping[str, Any]) -> str | None:
    """Up to which batch drafts pay; None where only one batch was measured."""
    found = document["break_even_batch"]
    if not found:
        return None
    largest = max(batch["batch"] for batch in document["batches"])
    said = []
    for name, batch in found.items():
        said.append(f"{name} {f'more than {largest}' if batch is None else 'none' if batch == 0 else f'{batch:.1f}'}")
    return f"drafts pay up to a batch of: {', '.join(said)}"


def walk_table(document: Mapping[str, Any]) -> WordTable | None:
    """Acceptance along real text; None for a model without heads."""
    if not document["walk"]:
        return None
    rows = [
        (
            f"chain-{walk['num_draft_tokens']}",
            _number(walk["mean_acceptance_length"], 2),
            " ".join(_number(rate, 2) for rate in walk["acceptance_rate"][: walk["num_draft_tokens"]]),
            str(walk["blocks"]),
        )
        for walk in document["walk"]
    ]
    return WordTable(
        "Along the prompts' own text, which the model did not write",
        ("drafts", "tokens per forward", "accepted per offset", "blocks"),
        rows,
    )


def verdict(figures: Mapping[str, Any]) -> str:
    """Whether an arm gave the plain arm's tokens; the gap is the largest between the two best logits where texts part."""
    if not figures["compared"]:
        return "drawn anew"
    differing, near = figures["differing_rows"], figures["near_ties"]
    if not differing:
        return "identical, another model" if figures.get("other_model") else "identical"
    rows = f"{differing} row{'' if differing == 1 else 's'} differ{'s' if differing == 1 else ''}"
    if near == differing:
        return f"{rows}: near-tie"
    gap = f"gap {figures['largest_gap']:.2g}"
    return f"{rows}, {near} near-ties, {gap}" if near else f"{rows}, {gap}"


def headline_lines(batch: Mapping[str, Any]) -> list[str]:
    """The headline in sentences."""
    headline = batch["headline"]
    if headline is None:
        lines = [
            f"batch {batch['batch']}: no headline: every call holds a text that loops, and loops are easy to draft for"
        ]
        expected = batch["expected_best_along_text"]
        if expected is not None:
            lines.append(
                f"batch {batch['batch']}: expected on real text, from the cost of a forward and the acceptance there: "
                f"{expected['arm']} {times(expected['over_fastest_plain'])} over the fastest plain engine "
                f"({batch['fastest_plain']})"
            )
        return lines
    lines = []
    gains = headline["engine_gain_over_hugging_face"]
    if gains is not None:
        said = ", ".join(f"{name} {_with_interval(gain, 2, unit='x')}" for name, gain in gains.items())
        other = " (whose text differs)" if arm_figures(batch, "hf")["unexplained_differences"] else ""
        lines.append(f"batch {batch['batch']}: engine gain, plain over Hugging Face generate{other}: {said}")
    if headline["best"] is not None:
        gain = _with_interval(headline["speculation_gain"], 2, unit="x")
        lines.append(
            f"batch {batch['batch']}: speculation gain, {headline['best']} over the fastest plain engine "
            f"({headline['fastest_plain']}): {gain}"
        )
    if headline["best_over_hugging_face"] is not None:
        whole = _with_interval(headline["best_over_hugging_face"], 2, unit="x")
        lines.append(f"batch {batch['batch']}: {headline['best']} over Hugging Face generate: {whole}")
    return lines


def skipped_lines(document: Mapping[str, Any]) -> list[str]:
    """Arms that were not measured, and why; arms with one reason share a line."""
    by_reason: dict[tuple[str, Any], list[str]] = {}
    for one in document["skipped"]:
        by_reason.setdefault((one["reason"], one["batch"]), []).append(one["arm"])
    return [
        f"skipped {', '.join(arms)}{'' if batch is None else f' at batch {batch}'}: {reason}"
        for (reason, batch), arms in by_reason.items()
    ]


def bench_tables(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Everything for the terminal."""
    for batch in document["batches"]:
        yield rich_table(speed_table(batch))
        if (acceptance := acceptance_table(batch)) is not None:
            yield rich_table(acceptance)
        yield rich_table(step_table(batch))
    for table in (walk_table(document), floor_table(document)):
        if table is not None:
            yield rich_table(table)
    if (line := break_even_line(document)) is not None:
        yield Text(line)
    for line in skipped_lines(document):
        yield Text(line, style="dim")
    for batch in document["batches"]:
        for line in headline_lines(batch):
            yield Text(line, style="bold")


def rich_table(words: WordTable) -> Table:
    """For the terminal."""
    table = Table(title=words.title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(words.columns):
        # The last column of the speeds is a sentence; figures and names stay whole.
        sentence = number == len(words.columns) - 1 and words.columns is SPEED_COLUMNS
        table.add_column(column, justify="left" if number == 0 or sentence else "right", no_wrap=not sentence)
    for number, row in enumerate(words.rows):
        table.add_row(*map(Text, row), style="bold green" if number == words.best else None)
    table.add_row()
    return table


def _texts(batch: Mapping[str, Any]) -> str:
    looping = f"{batch['looping_rows']} of {batch['rows']} texts loop"
    if batch["counted_calls"] == batch["calls"]:
        return f"{batch['rows']} texts, none loops"
    if not batch["counted_calls"]:
        return f"{looping}: figures of all texts, no headline"
    return f"{looping}; figures of {batch['counted_calls']} of {batch['calls']} calls without them"


def _with_interval(figure: Mapping[str, Any], digits: int, *, unit: str = "") -> str:
    if figure["median"] is None:
        return "-"
    low, high = (f"{figure[name]:.{digits}f}" for name in ("low", "high"))
    return f"{figure['median']:.{digits}f}{unit} [{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
