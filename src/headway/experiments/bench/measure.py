"""Rounds in which all arms take turns, with wall and CPU time of prefill and decoding apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from headway.errors import HeadwayError
from headway.experiments.bench.generation import Arm, Generation, PromptBatch, Skipped


@dataclass(frozen=True)
class Clock:
    """Seconds; replaced by tests.

    Attributes:
        wall: that pass.
        cpu: of this process, all threads together.
    """

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time

    def read(self) -> tuple[float, float]:
        """Both, when the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.wall(), self.cpu()


@dataclass(frozen=True)
class Timing:
    """One call: wall and CPU seconds of the prefill and of what came after it."""

    prefill_wall: float
    prefill_cpu: float
    wall: float
    cpu: float


@dataclass
class ArmRecord:
    """What an arm did.

    Attributes:
        arm: it.
        timings: per round and group.
        generations: per group, of the last round.
        changed: whether a later round gave other tokens than the first.
    """

    arm: Arm
    timings: list[list[Timing]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    changed: bool = False

    def speeds(self, groups: Collection[int]) -> list[float]:
        """Per round, tokens after the prefill over the wall seconds after it; NaN where there are none."""
        tokens = sum(self.generations[group].later_tokens for group in groups)
        return [_over(tokens, sum(timings[group].wall for group in groups)) for timings in self.timings]

    def whole_speeds(self, groups: Collection[int]) -> list[float]:
        """Per round, all new tokens over all wall seconds."""
        tokens = sum(len(row) for group in groups for row in self.generations[group].tokens)
        return [
            _over(tokens, sum(timings[group].wall + timings[group].prefill_wall for group in groups))
            for timings in self.timings
        ]

    def cpu_per_token(self, groups: Collection[int]) -> list[float]:
        """Per round, CPU seconds after the prefill per token."""
        tokens = sum(self.generations[group].later_tokens for group in groups)
        return [_over(sum(timings[group].cpu for group in groups), tokens) for timings in self.timings]

    def prefill_seconds(self, groups: Collection[int]) -> list[float]:
        """Per round, wall seconds until the first token, the mean over calls."""
        return [_over(sum(timings[group].prefill_wall for group in groups), len(groups)) for timings in self.timings]

    def step_seconds(self, groups: Collection[int]) -> list[float]:
        """Per round, wall seconds of a forward after the prefill, everything included."""
        forwards = sum(self.generations[group].forwards for group in groups)
        return [_over(sum(timings[group].wall for group in groups), forwards) for timings in self.timings]


@dataclass(frozen=True)
class Rounds:
    """All arms of one batch size.

    Attributes:
        records: of the arms that ran.
        skipped: arms that cannot decode this batch.
        read_seconds: per round, of reading the weights once; empty where it was not asked for.
    """

    records: list[ArmRecord]
    skipped: list[Skipped]
    read_seconds: list[float]


def timed(arm: Arm, batch: PromptBatch, clock: Clock) -> tuple[Generation, Timing]:
    """One call."""
    marks: list[tuple[float, float]] = []
    start = clock.read()
    generation = arm.decode(batch, lambda: marks.append(clock.read()))
    end = clock.read()
    first = marks[0] if marks else end
    return generation, Timing(first[0] - start[0], first[1] - start[1], end[0] - first[0], end[1] - first[1])


def run_rounds(
    arms: Sequence[Arm],
    groups: Sequence[PromptBatch],
    *,
    rounds: int,
    warmup: int,
    clock: Clock,
    read_weights: Callable[[], object] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Rounds:
    """Every arm on every group, `rounds` times over: the arms take turns group by group, another one first each time.

    Args:
        arms: ways to decode.
        groups: batches of one size.
        rounds: that are timed.
        warmup: rounds before them; at least one call of each arm is made before anything is timed.
        clock: tells seconds.
        read_weights: reads the weights once, to measure the memory in the same rounds.
        progress: is told which round begins.

    Raises:
        HeadwayError: of this project's engine; an arm of another engine that fails in its first call is skipped with the
            reason.
    """
    rows = groups[0].rows
    records: list[ArmRecord] = []
    skipped: list[Skipped] = []
    for arm in arms:
        if arm.one_row and rows > 1:
            skipped.append(Skipped(arm.name, f"{arm.engine} decodes this way one row at a time", rows))
            continue
        try:
            timed(arm, groups[0], clock)
        except HeadwayError:
            raise
        except Exception as error:
            if arm.engine == "headway":
                raise
            line = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
            skipped.append(Skipped(arm.name, f"{arm.engine} failed: {type(error).__name__}: {line}", rows))
            continue
        records.append(ArmRecord(arm))
    read_seconds: list[float] = []
    for number in range(warmup + rounds):
        counted = number >= warmup
        progress(f"batch {rows}: {f'round {number - warmup + 1} of {rounds}' if counted else 'warming up'}")
        timings: dict[str, list[Timing]] = {record.arm.name: [] for record in records}
        generations: dict[str, list[Generation]] = {record.arm.name: [] for record in records}
        for place, group in enumerate(groups):
            turn = (number + place) % len(records)
            for record in [*records[turn:], *records[:turn]]:
                generation, timing = timed(record.arm, group, clock)
                generations[record.arm.name].append(generation)
                timings[record.arm.name].append(timing)
        if counted and read_weights is not None:
            start = clock.read()
            read_weights()
            read_seconds.append(clock.read()[0] - start[0])
        for record in records:
            made = generations[record.arm.name]
            if record.generations and _tokens(made) != _tokens(record.generations):
                record.changed = True
            record.generations = made
            if counted:
                record.timings.append(timings[record.arm.name])
    return Rounds(records, skipped, read_seconds)


def _tokens(generations: Sequence[Generation]) -> list[list[list[int]]]:
    return [generation.tokens for generation in generations]


def _over(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan
