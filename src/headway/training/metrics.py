"""Metrics on disk: JSON lines and TensorBoard, without doubled or missing steps after a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from headway.errors import TrainingError
from headway.training.events import EvaluationDone, Event, StepDone
from headway.training.run_directory import EVALUATIONS, METRICS, TENSORBOARD


class MetricsWriter:
    """Writes what events say; hand it to the loop like any other listener.

    A killed run leaves lines of steps after its last checkpoint, and perhaps half a line: opening the writer for a
    resume drops both, so that the steps that are done again stand in the files once.
    """

    def __init__(self, folder: Path, *, resumed_step: int, tensorboard: bool) -> None:
        """Open the files.

        Args:
            folder: the run's output folder.
            resumed_step: steps that the checkpoint holds, 0 for a new run; later lines are dropped.
            tensorboard: whether to write TensorBoard events too.

        Raises:
            TrainingError: the disk refuses.
        """
        self._folder = folder
        try:
            self._steps = _open_after(folder / METRICS, resumed_step)
            self._evaluations = _open_after(folder / EVALUATIONS, resumed_step)
        except OSError as error:
            raise TrainingError(f"cannot write metrics to {folder}: {error}; choose another --output") from error
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
            self._write(self._steps, event.record())
            self._scalars(event.step, _step_scalars(event))
        elif isinstance(event, EvaluationDone):
            self._write(self._evaluations, {"step": event.step, "seconds": event.seconds, **event.values})
            self._scalars(event.step, dict(_flat("evaluation", event.values)))

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
        """Flush and close all files."""
        self.flush()
        self._steps.close()
        self._evaluations.close()
        if self._board is not None:
            self._board.close()

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

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file up to the first line that is not whole.

    Such a line can only be the work of a kill or a power cut after the last checkpoint, which flushes what precedes it.
    """
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break
            records.append(record)
    return records


def _open_after(path: Path, step: int) -> TextIO:
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in kept), encoding="utf-8")
        aside.replace(path)
    return path.open("a", encoding="utf-8")


def _step_scalars(event: StepDone) -> dict[str, float]:
    values: dict[str, float | None] = {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/gradient_norm": event.gradient_norm,
        "train/skipped_steps": event.skipped_steps,
        "train/tokens_per_second": event.tokens_per_second,
    }
    for offset, nats in enumerate(event.loss_per_offset or (), start=1):
        values[f"train/loss_offset_{offset}"] = nats
    return {name: value for name, value in values.items() if value is not None}


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, list | tuple):
            yield from _flat(f"{prefix}/{name}", {f"offset_{index}": item for index, item in enumerate(value, start=1)})
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", float(value)
