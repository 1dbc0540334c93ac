"""Decoding without a model: a clock, a table of costs, a text whose drafts are right by chance, and the real controller."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from headway.decoding.controller import DraftController, Experience, RowStep
from headway.decoding.forward_costs import ForwardCosts

LONGEST = 7

Accept = Callable[[int, int], float]
"""(place in the text, place in the draft) -> chance that a drafted token is right if those before it are."""

TEXTS: dict[str, Accept] = {
    "predictable": lambda place, offset: 0.9,
    "random": lambda place, offset: 0.02,
    "middling": lambda place, offset: (0.6, 0.4, *[0.3] * 5)[offset],
    "poor": lambda place, offset: (0.3, *[0.2] * 6)[offset],
    "alternating": lambda place, offset: 0.9 if place // 64 % 2 == 0 else 0.02,
    "alternating, random first": lambda place, offset: 0.9 if place // 64 % 2 else 0.02,
}


@dataclass(frozen=True)
class Machine:
    """Costs in plain forwards: 1 + verify(drafted tokens) + draft(drafted tokens).

    Attributes:
        rows: of a batch.
        verify: (tokens, cost) between which a cost lies on a line.
        draft: likewise.
        restart: what a draft after a plain forward costs beyond that, for heads with keys and values.
    """

    rows: int
    verify: tuple[tuple[int, float], ...]
    draft: tuple[tuple[int, float], ...]
    restart: float = 0.0

    def cost(self, verified: int, prepared: int, *, rested: bool) -> float:
        """Of a forward."""
        return 1 + _on(self.verify, verified) + _on(self.draft, prepared) + (self.restart if rested and prepared else 0)


def _on(points: tuple[tuple[int, float], ...], at: int) -> float:
    low, value = 0, 0.0
    for high, next_value in points:
        if at <= high:
            return value + (next_value - value) * (at - low) / (high - low)
        low, value = high, next_value
    return value


# CPU times of a byte model of 9M parameters with linear heads and a Markov bias (lean, float32, one thread of a busy Zen 4) for
# batch 1, 2 and 8; 4, 16 and 32 follow their trend. The last three have no model: heads with caches, and drafts that are dear.
MACHINES = {
    "batch 1": Machine(1, ((1, 0.10), (3, 0.12), (7, 0.25)), ((1, 0.05), (7, 0.22))),
    "batch 2": Machine(2, ((1, 0.06), (3, 0.18), (7, 0.50)), ((1, 0.03), (7, 0.11))),
    "batch 4": Machine(4, ((1, 0.25), (3, 0.40), (7, 1.30)), ((1, 0.04), (7, 0.15))),
    "batch 8": Machine(8, ((1, 0.40), (3, 0.80), (7, 1.60)), ((1, 0.04), (7, 0.13))),
    "batch 16": Machine(16, ((1, 0.30), (3, 0.90), (7, 1.90)), ((1, 0.03), (7, 0.09))),
    "batch 32": Machine(32, ((1, 0.60), (3, 1.80), (7, 4.20)), ((1, 0.03), (7, 0.08))),
    "batch 1, head caches": Machine(1, ((1, 0.06), (3, 0.12), (7, 0.25)), ((1, 0.10), (7, 0.60)), restart=0.4),
    "batch 8, head caches": Machine(8, ((1, 0.30), (3, 0.60), (7, 1.30)), ((1, 0.12), (7, 0.80)), restart=2.0),
    "drafts that never pay": Machine(1, ((1, 0.60), (7, 4.20)), ((1, 0.30), (7, 2.00))),
}


def experience_of(machine: Machine) -> Experience:
    """What the engine gives the first generation of a model."""
    return Experience(ForwardCosts(batch=machine.rows))


def simulate(
    machine: Machine,
    accept: Accept,
    tokens: int,
    *,
    seed: int = 0,
    fixed: int | None = None,
    experience: Experience | None = None,
    trials: bool = True,
    noise: float = 0.06,
    hiccups: float = 0.01,
    drift: float = 0.1,
    parting: float = 0.0,
) -> tuple[float, DraftController]:
    """Decode until every row has its tokens; returns how many plain forwards that took by true costs, and the controller.

    What the controller measures is the true cost times log-normal noise, four times as long at a hiccup, on a machine whose
    speed moves up and down and is another one in every generation.

    Args:
        machine: costs.
        accept: of the text.
        tokens: of every row; the first one comes from the prefill, which costs nothing here.
        seed: of everything.
        fixed: drafts of this length instead of the controller's.
        experience: of earlier generations; updated.
        trials: see `DraftController`.
        noise: standard deviation of the logarithm.
        hiccups: share of forwards.
        drift: largest change of speed.
        parting: what every forward costs more once rows stand at different positions.
    """
    rng = random.Random(seed)
    clock = [0.0]
    controller = DraftController(LONGEST, clock=lambda: clock[0], experience=experience, trials=trials)
    made = [0] * machine.rows
    verified, rested, trial, parted = 0, False, None, False
    phase, spent, forward = rng.uniform(0, 2 * math.pi), 0.0, 0
    while min(made) < tokens:
        length = controller.begin(tokens - min(made)) if fixed is None else fixed
        prepared = length or (controller.trial if fixed is None else 0)
        steps = []
        for row, before in enumerate(made):
            if before >= tokens:
                continue
            right = 0
            while right < verified and rng.random() < accept(before + right, right):
                right += 1
            emitted = min(right + 1, tokens - before)
            steps.append(RowStep(min(right, emitted), emitted))
            made[row] += emitted
        live = [count for count in made if count < tokens]
        if trial is not None:
            depth, found, deepest = trial
            found = [row for row in found if made[row] < tokens]
            still = [row for row in found if rng.random() < accept(made[row] - 1, depth - 1)]
            over = not still or depth == deepest
            controller.compared(depth, len(found), len(still), over=over)
            trial = None if over or length else (depth + 1, still, deepest)
        if forward:
            cost = machine.cost(verified, prepared, rested=rested) + parting * parted
            spent += cost
            speed = 1 + drift * math.sin(phase + forward / 150)
            clock[0] += cost * speed * rng.lognormvariate(0, noise) * (4 if rng.random() < hiccups else 1)
        if fixed is None:
            if controller.trial and not length:
                trial = (1, [row for row, count in enumerate(made) if count < tokens], controller.trial)
            lag = sum(live) / len(live) - min(live) if live else 0.0
            measured = forward > 0 and bool(live)
            parted = len(set(made)) > 1
            controller.end(steps, verified=verified, prepared=prepared, measured=measured, lag=lag, parted=parted)
        rested, verified, forward = prepared == 0, length, forward + 1
    return spent, controller


def ratio_to_plain(machine: Machine, accept: Accept, tokens: int, **options: object) -> float:
    """How many times as fast as plain decoding."""
    return (tokens - 1) / simulate(machine, accept, tokens, **options)[0]  # type: ignore[arg-type]
