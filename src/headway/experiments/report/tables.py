"""The report's tables: the same cells for the page and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headway.experiments.report.curves import TRAINING, Figure, figures
from headway.experiments.report.efficiency import SampleEfficiency
from headway.experiments.report.runs import RunRecords, number

# Where a run lies, how it is watched and how it goes on change nothing that it learns.
_NOT_COMPARED = (
    "output",
    "resume",
    "overwrite",
    "cache_directory",
    "tensorboard",
    "track",
    "track_project",
    "mfu_peak",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_best",
    "loader_workers",
    "threads",
)
_SAME_TEXT = (
    "data",
    "held_out",
    "held_out_fraction",
    "split_seed",
    "suffixes",
    "tokenizer",
    "sequence_length",
    "eval_rows",
)


@dataclass(frozen=True)
class Table:
    """A table whose first column is text.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: cells; a cell after a line break is a remark on the one before it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def final_table(runs: Sequence[RunRecords]) -> Table:
    """Where every run stands: its newest figures, the differences from the first run under them."""
    rows = [
        ("state", *(_state(run) for run in runs)),
        ("future tokens (n)", *("-" if run.num_future_tokens is None else str(run.num_future_tokens) for run in runs)),
        _row("parameters", [number((run.result or {}).get("num_parameters")) for run in runs], counted, relative),
        _row("training tokens", [_last(run, "tokens") for run in runs], counted, relative),
        _row("training FLOPs", [_last(run, "flops") for run in runs], counted, relative),
    ]
    for figure in figures(runs):
        if figure.section != TRAINING:
            shown = share if figure.share else decimals
            rows.append(_row(figure.title, [figure.last(run) for run in runs], shown, _difference(figure)))
    rows += [
        _row("Training loss in all, last step", [_last(run, "loss") for run in runs], decimals, None),
        _row("tokens/s (median)", [_median(run, "tokens_per_second") for run in runs], counted, relative),
        _row("MFU (median)", [_median(run, "mfu") for run in runs], share, None),
        _row("GPU memory, peak", [_largest(run, "gpu_peak_bytes") for run in runs], gibibytes, relative),
        _row("memory in RAM, largest", [_largest(run, "resident_bytes") for run in runs], gibibytes, relative),
        _row("training time", [_last(run, "elapsed_seconds") for run in runs], duration, relative),
        _row("skipped steps", [_last(run, "skipped_steps") for run in runs], lambda value: f"{value:.0f}", None),
    ]
    kept = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return Table("Where the runs stand", ("", *(run.name for run in runs)), tuple(kept))


def option_table(runs: Sequence[RunRecords]) -> Table | None:
    """The options in which the runs differ; None where they do not, or fewer than two tell theirs."""
    differences = option_differences(runs)
    if not differences:
        return None
    told = [run for run in runs if run.options]
    rows = tuple((name, *(_option(value) for value in values.values())) for name, values in differences.items())
    return Table("Options in which they differ", ("", *(run.name for run in told)), rows)


def option_differences(runs: Sequence[RunRecords]) -> dict[str, dict[str, Any]]:
    """Option -> run -> value, of every option that is not the same in all runs that tell their options."""
    told = [run for run in runs if run.options]
    names = dict.fromkeys(name for run in told for name in run.options if name not in _NOT_COMPARED)
    by_name = {name: {run.name: run.options.get(name) for run in told} for name in names}
    return {name: values for name, values in by_name.items() if len({_option(value) for value in values.values()}) > 1}


def warnings(runs: Sequence[RunRecords]) -> list[str]:
    """What makes a comparison doubtful, and what the files lack; one sentence each."""
    differences = option_differences(runs)
    other_text = [name for name in _SAME_TEXT if name in differences]
    said = [note for run in runs for note in run.notes]
    if other_text:
        said.insert(
            0,
            f"the runs were not evaluated on the same tokens ({', '.join(other_text)} differ), so that their held-out "
            "figures do not compare strictly",
        )
    if "seed" not in differences and len(runs) > 1:
        said.append("the runs share one seed: differences as small as those between two seeds mean nothing")
    return said


def efficiency_table(found: SampleEfficiency) -> Table:
    """What every run needs for the same loss, and the loss at the same budget."""
    names = {"tokens": "tokens", "flops": "FLOPs"}
    rows: list[tuple[str, ...]] = [("lowest loss", *(decimals(value) for value in found.best))]
    for axis, needs in found.needs.items():
        cells = []
        for need in needs:
            if need is None:
                cells.append("-")
                continue
            ratio = "" if need.ratio is None or need is needs[0] else f"\n{need.ratio:.2f}x the first run's"
            cells.append(f"{'at most ' if need.at_most else ''}{counted(need.amount)}{ratio}")
        rows.append((f"{names[axis]} for {decimals(found.level)}", *cells))
    for axis, budget in found.budgets.items():
        if budget is not None:
            values = found.at_budget[axis]
            rows.append(_row(f"loss at {counted(budget)} {names[axis]}", values, decimals, _minus))
    kept = [row for row in rows if any(cell != "-" for cell in row[1:])]
    title = f"Sample efficiency: held-out {found.figure.unit} of offset 1"
    return Table(title, ("", *found.runs), tuple(kept))


def decimals(value: float) -> str:
    """Three decimals, fewer digits where a number is large.

    >>> decimals(1.23456), decimals(123.456)
    ('1.235', '123')
    """
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def share(value: float) -> str:
    """A share in percent.

    >>> share(0.456)
    '45.6 %'
    """
    return f"{100 * value:.1f} %"


def amount(value: float) -> str:
    """A count that can be read at a glance.

    >>> amount(999), amount(12_345_678), amount(7e13)
    ('999', '12.3 M', '70 T')
    """
    size, unit = _unit(value)
    return f"{value / size:.3g}{unit}"


def counted(value: float) -> str:
    """The same with three digits in any case, for columns.

    >>> counted(999), counted(12_345_678), counted(7e13)
    ('999', '12.3 M', '70.0 T')
    """
    size, unit = _unit(value)
    return f"{value / size:#.3g}{unit}".replace(". ", " ").removesuffix(".")


def _unit(value: float) -> tuple[float, str]:
    units = ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
    # what rounds up to the next unit belongs to it
    return next(((size, unit) for size, unit in units if abs(value) >= 0.9995 * size), (1.0, ""))


def duration(seconds: float) -> str:
    """Hours, minutes, seconds.

    >>> duration(3725.2), duration(65), duration(9.4)
    ('1 h 2 min', '1 min 5 s', '9.4 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def gibibytes(value: float) -> str:
    """Bytes in GiB.

    >>> gibibytes(3 * 2**29)
    '1.50 GiB'
    """
    return f"{value / 2**30:.2f} GiB"


def relative(value: float, first: float) -> str | None:
    """A factor, where there is one to tell."""
    factor = f"{value / first:.2f}x" if first else None
    return None if factor == "1.00x" else factor


def _minus(value: float, first: float) -> str | None:
    return f"{value - first:+.3f}" if value != first else None


def _difference(figure: Figure) -> Callable[[float, float], str | None]:
    def tell(value: float, first: float) -> str | None:
        if value == first:
            return None
        return f"{100 * (value - first):+.1f} points" if figure.share else f"{value - first:+.3f}"

    return tell


def _row(
    label: str,
    values: Sequence[float | None],
    shown: Callable[[float], str],
    compared: Callable[[float, float], str | None] | None,
) -> tuple[str, ...]:
    first, cells = values[0], []
    for place, value in enumerate(values):
        remark = None
        if place and value is not None and first is not None and compared is not None:
            remark = compared(value, first)
        cells.append("-" if value is None else shown(value) + (f"\n{remark}" if remark else ""))
    return (label, *cells)


def _state(run: RunRecords) -> str:
    done = run.steps[-1]["step"] if run.steps else 0
    if run.result is not None:
        return f"finished\n{done:,} steps"
    planned = run.options.get("steps")
    of = f" of {planned:,}" if isinstance(planned, int) and run.options.get("epochs") is None else ""
    return f"unfinished\nstep {done:,}{of}"


def _told(run: RunRecords, name: str) -> Iterator[float]:
    return (value for record in run.steps if (value := number(record.get(name))) is not None)


def _last(run: RunRecords, name: str) -> float | None:
    values = list(_told(run, name))
    return values[-1] if values else None


def _median(run: RunRecords, name: str) -> float | None:
    values = list(_told(run, name))
    return statistics.median(values) if values else None


def _largest(run: RunRecords, name: str) -> float | None:
    return max(_told(run, name), default=None)


def _option(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
