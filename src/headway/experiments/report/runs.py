"""A run as its folder tells it: JSON lines, options, result."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headway.errors import DataError
from headway.training.metric_files import read_metrics
from headway.training.run_files import CONFIG, EVALUATIONS, METRICS, RESULT


@dataclass(frozen=True, eq=False)
class RunRecords:
    """What a run has written up to now.

    Attributes:
        name: short, unlike that of every other run of the report.
        folder: as it was given.
        steps: lines of metrics.jsonl, one per step, in order.
        evaluations: lines of evaluations.jsonl, one per step, in order, each with its `tokens`.
        options: of config.yaml; empty where there is none.
        result: of result.json; None where the run is not finished, or only its lines were copied.
        notes: what a reader should know of the files, one sentence each.
    """

    name: str
    folder: str
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    options: dict[str, Any]
    result: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def num_future_tokens(self) -> int | None:
        """n: as the options say, else as many offsets as the losses have; None where neither is known."""
        known = self.options.get("num_future_tokens")
        if isinstance(known, int):
            return known
        for record in (*self.steps, *self.evaluations):
            for name in ("loss_per_offset", "nats"):
                if isinstance(record.get(name), list):
                    return len(record[name])
        return None


def read_runs(folders: Sequence[Path]) -> tuple[RunRecords, ...]:
    """Read runs in the order given; a folder that is given twice is read once.

    Raises:
        DataError: no folder, or one that holds no run.
    """
    if not folders:
        raise DataError("a report needs at least one run; pass the --output folder of headway train")
    unique = list({folder.resolve(): folder for folder in folders}.values())
    names = _short_names([folder.resolve() for folder in unique])
    return tuple(_read_run(folder, name) for folder, name in zip(unique, names, strict=True))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _read_run(folder: Path, name: str) -> RunRecords:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; pass the --output folder of headway train")
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder} holds no run (it has no {METRICS}); pass the --output folder of headway train")
    notes: list[str] = []
    try:
        steps = _records(folder / METRICS, notes)
        evaluations = _records(folder / EVALUATIONS, notes) if (folder / EVALUATIONS).exists() else ()
        options = _mapping(yaml.safe_load, folder / CONFIG, notes)
        result = _mapping(json.loads, folder / RESULT, notes) or None
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; check its permissions") from error
    if not steps:
        notes.append(f"{name} has logged no step yet")
    if not evaluations:
        notes.append(f"{name} has no evaluation: only its training loss can be shown")
    elif all(number(record.get("flops")) is None for record in evaluations):
        notes.append(f"{name} does not tell its operations, so it is missing where curves run over FLOPs")
    with_tokens = tuple(_with_tokens(evaluations, steps))
    return RunRecords(name, str(folder), steps, with_tokens, options, result, tuple(notes))


def _records(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """One record per step, the last one written, in the order of steps."""
    records = read_metrics(path)
    lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    if lines > len(records):
        notes.append(f"{path.parent.name}/{path.name}: line {len(records) + 1} is broken; what follows it was left out")
    by_step = {record["step"]: record for record in records if isinstance(record.get("step"), int)}
    return tuple(by_step[step] for step in sorted(by_step))


def _mapping(read: Any, path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.parent.name}/{path.name} cannot be read and was left out")
        return {}
    return content


def _with_tokens(evaluations: Iterable[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Evaluations of older runs do not tell their tokens; the steps around them do."""
    known = [(0, 0.0)] + [(r["step"], tokens) for r in steps if (tokens := number(r.get("tokens"))) is not None]
    for record in evaluations:
        if number(record.get("tokens")) is None and len(known) > 1:
            place = min(max(bisect_right([step for step, _ in known], record["step"]), 1), len(known) - 1)
            (left, before), (right, after) = known[place - 1 : place + 1]
            record = record | {"tokens": before + (after - before) * (record["step"] - left) / (right - left)}
        yield record


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell it from the others."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
