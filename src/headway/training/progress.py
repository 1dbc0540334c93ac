"""What a person sees while a run trains: one screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live

from headway.training.events import CheckpointWritten, EvaluationDone, Event, Notice, RunEnded, RunStarted, StepDone
from headway.training.figures_in_words import describe_figures, duration, memory, mix, percent, weights
from headway.training.screen import Screen
from headway.training.standing import Standing


class TrainingProgress:
    """A listener of `train` that draws on a console.

    On a terminal one screen moves: losses, accuracies and acceptances per offset, speed, memory, the time left. Where
    output is piped, each logged step is one plain line. Evaluations and findings are lines of their own in both.
    """

    def __init__(self, console: Console) -> None:
        """Draw on `console`, which should be on stderr."""
        self._console = console
        self._standing = Standing()
        self._live: Live | None = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._standing.take(event)
        match event:
            case RunStarted():
                self._start()
            case StepDone():
                if self._live is None and event.logged:
                    self._line(step_line(self._standing))
            case EvaluationDone():
                self._line(f"step {event.step}: {describe_figures(event.values)}")
            case Notice():
                self._line(event.text)
            case CheckpointWritten():
                if self._live is None:
                    self._line(f"step {event.step}: checkpoint written")
            case RunEnded():
                self.close()

    def close(self) -> None:
        """Leave the terminal as it was, with the last screen on it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start(self) -> None:
        if not self._console.is_terminal:
            return
        self._live = Live(Screen(self._standing), console=self._console, refresh_per_second=4)
        self._live.start()

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def step_line(standing: Standing) -> str:
    """The newest step in one line: loss in all and per offset, accuracy, speed, memory, the time left."""
    run, step = standing.run, standing.step
    assert run is not None, "RunStarted comes before the first step"
    assert step is not None, "there is a line for a step that was done"
    parts = [f"step {step.step}/{run.steps}"]
    if step.loss is None or step.loss_per_offset is None:
        parts.append("loss not finite")
    elif len(step.loss_per_offset) == 1:
        parts.append(f"loss {step.loss:.3f}")
    else:
        per_offset = ["-" if nats is None else f"{nats:.3f}" for nats in step.loss_per_offset]
        # The losses add up to the whole where all count and nothing else is trained.
        summed = step.objective_per_offset is None and step.auxiliary_loss is None and None not in step.loss_per_offset
        parts.append(f"loss {step.loss:.3f}{' = ' if summed else ': '}{(' + ' if summed else ' ').join(per_offset)}")
    if step.offset_weights is not None and (shown := weights(step.offset_weights)) is not None:
        parts[-1] = parts[-1].replace(" = ", ": ").replace(" + ", " ")
        parts.append(f"weights {shown}")
    if step.objective_per_offset is not None:
        parts.append(f"objective {' '.join('-' if v is None else f'{v:.3f}' for v in step.objective_per_offset)}")
    if step.auxiliary_loss is not None:
        parts.append(f"auxiliary {step.auxiliary_loss:.3f}")
    if step.accuracy_per_offset is not None:
        shares = ["-" if share is None else f"{100 * share:.1f}" for share in step.accuracy_per_offset]
        parts.append(f"accuracy {' '.join(shares)} %")
    if step.gradient_norm is not None:
        parts.append(f"gradient {step.gradient_norm:.3g}")
    parts += [f"rate {step.learning_rate:.3g}", f"{step.tokens_per_second:,.0f} tokens/s"]
    if step.mfu is not None:
        parts.append(f"MFU {percent(step.mfu)}")
    if (held := memory(step.resident_bytes, step.gpu_peak_bytes)) is not None:
        parts.append(held)
    parts.append(f"ETA {duration(standing.seconds_left)}")
    if step.skipped_steps:
        parts.append(f"skipped {step.skipped_steps}")
    if step.data_mix is not None:
        parts.append(f"data {mix(step.data_mix)}")
    return "  ".join(parts)
