"""Where a run stands: the newest of everything that its events have told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.training.events import CheckpointWritten, EvaluationDone, Event, RunStarted, StepDone


class Standing:
    """Takes events and keeps what a display shows.

    Attributes:
        run: how the run started; None before.
        step: the newest step; None before the first.
        logged: the newest step that told everything; None before the first.
        evaluation: the newest evaluation; None before the first.
    """

    def __init__(self) -> None:
        self.run: RunStarted | None = None
        self.step: StepDone | None = None
        self.logged: StepDone | None = None
        self.evaluation: EvaluationDone | None = None
        self._between_steps = 0.0

    def take(self, event: Event) -> None:
        """Remember what an event tells."""
        match event:
            case RunStarted():
                self.run = event
            case StepDone():
                self.step = event
                if event.logged:
                    self.logged = event
            case EvaluationDone():
                self.evaluation = event
                self._between_steps += event.seconds
            case CheckpointWritten():
                self._between_steps += event.seconds

    @property
    def seconds_left(self) -> float | None:
        """At the speed of late, with evaluations and checkpoints as often as up to now; None where there is no speed yet."""
        if self.run is None or self.step is None or not self.step.tokens_per_second:
            return None
        done = self.step.step - self.run.first_step + 1
        one = self.run.tokens_per_step / self.step.tokens_per_second + self._between_steps / done
        return (self.run.steps - self.step.step) * one

    def evaluated(self, name: str) -> Any:
        """A figure of the newest evaluation; None where it has none of that name."""
        return None if self.evaluation is None else self.evaluation.values.get(name)

    def evaluated_offsets(self, name: str, *, first: int = 1) -> Sequence[float | None] | None:
        """A list of the newest evaluation with offset 1 in front, whatever offset it begins with."""
        values = self.evaluated(name)
        return [None] * (first - 1) + list(values) if isinstance(values, list | tuple) else None
