"""Metrics on disk and at a tracker, nothing doubled or missing after a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from headway.errors import TrainingError
from headway.training.best import first_offset
from headway.training.events import EvaluationDone, Event, StepDone
from headway.training.metric_files import read_metrics
from headway.training.run_directory import EVALUATIONS, METRICS, TENSORBOARD
from headway.training.tensorboard_files import drop_later_events
from headway.training.tracking import Tracker

_PER_OFFSET = {
    "loss_per_offset": "train/loss_offset",
    "accuracy_per_offset": "train/accuracy_offset",
    "objective_per_offset": "train/objective_offset",
    "offset_weights": "train/weight_offset",
}
_NOT_FIGURES = ("step", "applied", "logged")


class MetricsWriter:
    """Writes what events say; hand it to the loop like any other listener.

    A killed run leaves lines of steps after its last checkpoint, and perhaps half a line: opening the writer for a
    resume drops both, so that the steps that are done again stand in the files once. A tracker cannot be told to forget:
    it is not told again of steps that it has heard of, and a tracker that joins late hears first of what is past.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resumed_step: int,
        tensorboard: bool,
        open_tracker: Callable[[Path], Tracker] | None = None,
    ) -> None:
        """Open the files.

        Args:
            folder: the run's output folder.
            resumed_step: steps that the checkpoint holds, 0 for a new run; later lines are dropped.
            tensorboard: whether to write TensorBoard events too.
            open_tracker: opens the tracked run of this folder, where one is asked for.

        Raises:
            TrainingError: the disk refuses, or the tracker.
        """
        self._folder = folder
        self._tracker = None if open_tracker is None else open_tracker(folder)
        # Every line goes to the file first, so the files know what the tracker has heard of.
        told = self._tracker is not None and self._tracker.continued
        last_step, last_evaluation = _last_step(folder / METRICS), _last_step(folder / EVALUATIONS)
        self._told_step, self._told_evaluation = (last_step, last_evaluation) if told else (0, 0)
        try:
            if max(last_step, last_evaluation) > resumed_step:
                drop_later_events(folder / TENSORBOARD, resumed_step)
            self._steps = _open_after(folder / METRICS, resumed_step)
            self._evaluations = _open_after(folder / EVALUATIONS, resumed_step)
        except OSError as error:
            raise TrainingError(f"cannot write metrics to {folder}: {error}; choose another --output") from error
        if self._tracker is not None and not told:
            self._tell_what_is_past(self._tracker)
        self._board: Any = None
        if tensorboard:
            purge_step = resumed_step + 1 if resumed_step else None
            try:
                self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step)
            except OSError as error:
                raise self._refused(error) from error

    def __call__(self, event: Event) -> None:
        """Write a logged step or an evaluation; other events are none of its business."""
        if isinstance(event, StepDone) and event.logged:
            record = event.record()
            self._write(self._steps, record)
            self._scalars(event.step, step_scalars(record), told=event.step <= self._told_step)
        elif isinstance(event, EvaluationDone):
            record = event.record()
            self._write(self._evaluations, record)
            self._scalars(event.step, evaluation_scalars(record), told=event.step <= self._told_evaluation)

    def flush(self) -> None:
        """Reach the disk; the loop calls this before a checkpoint says that these steps are done."""
        try:
            for file in (self._steps, self._evaluations):
                file.flush()
                os.fsync(file.fileno())
            if self._board is not None:
                self._board.flush()
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Flush and close all files, and end the tracked run; what a full disk refuses is told once, everything is closed."""
        try:
            with ExitStack() as closing:
                for owned in (self._steps, self._evaluations, self._board, self._tracker):
                    if owned is not None:
                        closing.callback(owned.close)
                self.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _write(self, file: TextIO, record: Mapping[str, Any]) -> None:
        try:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"cannot write metrics to {self._folder}: {error.strerror}; free space, then start the same command again"
        )

    def _scalars(self, step: int, values: Mapping[str, float], *, told: bool) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._tracker is not None and not told:
            self._tracker.log(step, values)

    def _tell_what_is_past(self, tracker: Tracker) -> None:
        past = [(record["step"], step_scalars(record)) for record in read_metrics(self._folder / METRICS)]
        past += [(record["step"], evaluation_scalars(record)) for record in read_metrics(self._folder / EVALUATIONS)]
        for step, values in sorted(past, key=lambda item: item[0]):
            tracker.log(step, values)


def step_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as named numbers; what is not known is left out.

    >>> step_scalars({"step": 3, "loss": 1.5, "loss_per_offset": [1.0, 0.5], "gradient_norm": None})
    {'train/loss': 1.5, 'train/loss_offset_1': 1.0, 'train/loss_offset_2': 0.5}
    """
    values: dict[str, float] = {}
    for name, value in record.items():
        if name in _PER_OFFSET:
            for offset, item in enumerate(value or (), start=1):
                if item is not None:  # an offset without a weight is not computed
                    values[f"{_PER_OFFSET[name]}_{offset}"] = item
        elif name == "data_mix":
            values |= {f"train/data_mix/{share['source']}": share["drawn"] for share in value or ()}
        elif name not in _NOT_FIGURES and isinstance(value, int | float):
            values[f"train/{name}"] = value
    return values


def evaluation_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of evaluations.jsonl as named numbers; lists have one number per offset.

    >>> evaluation_scalars({"step": 3, "seconds": 0.1, "nats": [1.0, 2.0], "walk_acceptance_rate": [0.5]})
    {'evaluation/nats/offset_1': 1.0, 'evaluation/nats/offset_2': 2.0, 'evaluation/walk_acceptance_rate/offset_2': 0.5}
    """
    return dict(_flat("evaluation", {name: value for name, value in record.items() if name not in ("step", "seconds")}))


def _last_step(path: Path) -> int:
    records = read_metrics(path)
    return int(records[-1]["step"]) if records else 0


def _open_after(path: Path, step: int) -> TextIO:
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in kept), encoding="utf-8")
        aside.replace(path)
    return path.open("a", encoding="utf-8")


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, list | tuple):
            yield from _flat(f"{prefix}/{name}", _by_offset(name, value))
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", float(value)


def _by_offset(name: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"offset_{offset}": value for offset, value in enumerate(values, start=first_offset(name))}
