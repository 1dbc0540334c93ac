"""The one screen of a run on a terminal: what each offset does, what it costs, how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headway.training.figures_in_words import duration, memory, mix, percent
from headway.training.standing import Standing

_LABEL_WIDTH, _COLUMN_WIDTH = 20, 8


class Screen:
    """Draws a `Standing`; what is not known has no place on it.

    Args:
        standing: what to draw, at every refresh anew.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The rows of the screen for a width."""
        yield self._progress()
        if self._standing.step is not None:
            yield self._offsets(options.max_width)
            yield self._facts()

    def _progress(self) -> Table:
        run, step = self._standing.run, self._standing.step
        assert run is not None, "a run has started before there is a screen"
        done = run.first_step - 1 if step is None else step.step
        row = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None, None):
            row.add_column(ratio=ratio, no_wrap=True)
        row.add_row(
            Text(f"step {done:,}/{run.steps:,}", style="bold"),
            ProgressBar(total=run.steps, completed=done),
            percent(done / run.steps),
            "first step ..." if step is None else duration(step.elapsed_seconds),
            "" if step is None else f"ETA {duration(self._standing.seconds_left)}",
        )
        return row

    def _offsets(self, width: int) -> Table:
        standing = self._standing
        assert standing.run is not None
        assert standing.step is not None
        shown = min(standing.run.num_future_tokens, max(1, (width - _LABEL_WIDTH) // (_COLUMN_WIDTH + 1)))
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=True, header_style="dim")
        table.add_column("offset", width=_LABEL_WIDTH, no_wrap=True)
        for offset in range(1, shown + 1):
            hidden = offset == shown < standing.run.num_future_tokens
            table.add_column(f"{offset} ..." if hidden else str(offset), justify="right", width=_COLUMN_WIDTH)
        logged = standing.logged
        _add(table, "loss", standing.step.loss_per_offset, nats)
        if logged is not None:
            _add(table, "objective", logged.objective_per_offset, nats)
            _add(table, "accuracy", logged.accuracy_per_offset, percent)
            if logged.offset_weights is not None and any(weight != 1 for weight in logged.offset_weights):
                _add(table, "weight in the loss", logged.offset_weights, lambda weight: f"{weight:.3g}")
        if standing.evaluation is not None:
            table.add_row(Text(f"held-out text, step {standing.evaluation.step:,}", style="dim"))
            table.columns[0].width = max(_LABEL_WIDTH, len(f"held-out text, step {standing.evaluation.step:,}"))
            _add(table, "  loss", standing.evaluated_offsets("nats"), nats)
            _add(table, "  accuracy", standing.evaluated_offsets("accuracy"), percent)
            _add(table, "  accepted", standing.evaluated_offsets("walk_acceptance_rate", first=2), percent)
            _add(table, "  accepted, decoded", standing.evaluated_offsets("decoded_acceptance_rate", first=2), percent)
        return table

    def _facts(self) -> Text:
        standing = self._standing
        step, logged = standing.step, standing.logged
        assert step is not None
        lengths = [
            f"{name} {value:.2f}"
            for name, key in (
                ("along held-out text", "walk_acceptance_length"),
                ("decoded", "decoded_acceptance_length"),
            )
            if isinstance(value := standing.evaluated(key), int | float)
        ]
        lines = [[f"tokens per forward: {', '.join(lengths)}"] if lengths else []]
        lines.append(
            [
                "loss not finite" if step.loss is None else f"loss {step.loss:.3f}",
                *([] if step.auxiliary_loss is None else [f"auxiliary {step.auxiliary_loss:.3f}"]),
                *([] if step.gradient_norm is None else [f"gradient norm {step.gradient_norm:.3g}"]),
                f"learning rate {step.learning_rate:.3g}",
                f"skipped steps {step.skipped_steps}",
            ]
        )
        lines.append([f"{step.tokens:,} tokens", f"{step.tokens_per_second:,.0f} tokens/s"])
        if logged is not None:
            held = memory(logged.resident_bytes, logged.gpu_peak_bytes)
            lines[-1] += [
                *([] if logged.mfu is None else [f"MFU {percent(logged.mfu)}"]),
                *([] if held is None else [held]),
                *([] if logged.flops is None else [f"{logged.flops:.3g} FLOP"]),
            ]
            if logged.data_mix is not None:
                lines.append([f"data: {mix(logged.data_mix)}"])
        return Text("\n".join("   ".join(line) for line in lines if line))


def nats(value: float | None) -> str:
    """A loss, a dash where there is none.

    >>> nats(1.25), nats(None)
    ('1.250', '-')
    """
    return "-" if value is None else f"{value:.3f}"


def _add(table: Table, label: str, values: Sequence[float | None] | None, word: Callable[..., str]) -> None:
    """A row of figures per offset, where there are any."""
    if values is not None:
        table.add_row(label, *(word(value) for value in values[: len(table.columns) - 1]))
