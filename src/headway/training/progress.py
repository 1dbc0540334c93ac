"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from headway.training.events import CheckpointWritten, EvaluationDone, Event, Notice, RunEnded, RunStarted, StepDone


class TrainingProgress:
    """A listener of `train` that draws on a console.

    On a terminal one line moves: steps, loss per offset, tokens per second and the time left. Where output is piped,
    each logged step is one plain line. Evaluations and findings are lines of their own in both.
    """

    def __init__(self, console: Console) -> None:
        """Draw on `console`, which should be on stderr."""
        self._console = console
        self._started: RunStarted | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case EvaluationDone():
                self._line(f"step {event.step}: {describe_figures(event.values)}")
            case Notice():
                self._line(event.text)
            case CheckpointWritten():
                if self._progress is None:
                    self._line(f"step {event.step}: checkpoint written")
            case RunEnded():
                self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, event: RunStarted) -> None:
        self._started = event
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            "training", total=event.steps, completed=event.first_step - 1, figures="first step ..."
        )
        self._progress.start()

    def _step(self, event: StepDone) -> None:
        assert self._started is not None, "RunStarted comes before the first step"
        figures = step_figures(event, self._started)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=event.step, figures=figures)
        elif event.logged:
            self._line(f"step {event.step}/{self._started.steps}  {figures}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def step_figures(event: StepDone, run: RunStarted) -> str:
    """Loss per offset, speed and time left of a step, in words."""
    if event.loss_per_offset is None:
        loss = "loss not finite"
    else:
        loss = f"loss {' '.join(f'{nats:.3f}' for nats in event.loss_per_offset)}"
    remaining = (run.steps - event.step) * run.tokens_per_step
    left = timedelta(seconds=round(remaining / event.tokens_per_second)) if event.tokens_per_second else "?"
    skipped = f"  skipped {event.skipped_steps}" if event.skipped_steps else ""
    return f"{loss}  {event.tokens_per_second:,.0f} tokens/s  ETA {left}{skipped}"


def describe_figures(values: Mapping[str, Any]) -> str:
    """Figures of an evaluation as one line.

    >>> describe_figures({"nats": [1.25, 2.0], "walk_acceptance_length": 1.75})
    'nats 1.250 2.000; walk_acceptance_length 1.750'
    """
    return "; ".join(f"{name} {_numbers(value)}" for name, value in values.items() if _is_figure(value))


def _is_figure(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return all(item is None or isinstance(item, int | float) for item in items)


def _numbers(value: Any) -> str:
    if isinstance(value, Sequence):
        return " ".join(_numbers(item) for item in value)
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
