"""How much each offset counts in the loss, and when; needs no torch.

Legend: N offsets, w_k the weight of offset k at full strength, s the optimizer step from 1, S the schedule's steps.

    schedule             weight of offset k at step s
    constant             w_k
    linear               w_k min(1, s/S) for k > 1                      a warm-up of the heads where S is a part of the run
    sine                 w_k sin(pi/2 min(1, s/S)) for k > 1
    step                 w_k to step S, w_k x (after / before) then, for k > 1
    forward_curriculum   w_k where k <= 1 + floor((s-1) N/S), else 0    starts with the next token, adds heads
    reverse_curriculum   w_k where k <= N - floor((s-1) N/S), else 0    starts with all, drops heads; 1 remains
    fade                 as reverse_curriculum, and the farthest offset that is left falls linearly to 0 in its stage

The next token's weight never changes. A schedule has no state: resuming it is asking for another step.

Source: linear, sine: Medusa's fork of axolotl; step: DeepSeek-V3 (arXiv:2412.19437), 0.3, then 0.1; curricula: Aynetdinov
and Akbik 2025 (arXiv:2505.22757), a head every S/N steps; fade: the multi-token record of modded-nanogpt, 2025-12-22,
weights [1, 0.5, 0.25->0], [1, 0.5->0], [1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WeightSchedule = Literal["constant", "linear", "sine", "step", "forward_curriculum", "reverse_curriculum", "fade"]

CURRICULA: frozenset[str] = frozenset({"forward_curriculum", "reverse_curriculum", "fade"})
"""Schedules in which offsets rest."""


def full_weights(
    num_offsets: int,
    *,
    given: Sequence[float] | None = None,
    decay: float | None = None,
    normalize: bool = False,
    head_weight: float = 1.0,
) -> tuple[float, ...]:
    """The weights at full strength: 1 for the next token, for offset k > 1 a list's or a power's share.

    >>> full_weights(4, decay=0.5)
    (1.0, 0.5, 0.25, 0.125)
    >>> [round(weight, 2) for weight in full_weights(4, decay=0.6, normalize=True)]
    [1.0, 0.51, 0.31, 0.18]
    >>> full_weights(3, normalize=True, head_weight=0.5)
    (1.0, 0.25, 0.25)

    Args:
        num_offsets: N.
        given: all N weights; None: see `decay`.
        decay: offset k gets decay^(k-1); None: all 1.
        normalize: scale the weights beyond the next token to a sum of 1 before `head_weight`.
        head_weight: factor on the weights beyond the next token.

    Source: Medusa (arXiv:2401.10774): 0.8^k times a coefficient of the heads; FastMTP (arXiv:2509.18362): beta^(k-1) over
    its sum; DeepSeek-V3: lambda / D for each of D heads, `normalize` with `head_weight` lambda.
    """
    weights = [1.0 if decay is None else decay**k for k in range(num_offsets)] if given is None else list(given)
    total = sum(weights[1:])
    scale = head_weight / total if normalize and total else head_weight
    return (weights[0], *(weight * scale for weight in weights[1:]))


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """The loss weights of a run.

    Attributes:
        weights: w_1 .. w_N at full strength.
        schedule: see the module's text.
        steps: S, at least 1: the schedule is over after it and stays as it is.
        after: "step": the factor on the weights beyond the next token after step S.
    """

    weights: tuple[float, ...]
    schedule: WeightSchedule = "constant"
    steps: int = 1
    after: float = 1.0

    def __post_init__(self) -> None:
        assert self.steps >= 1, "a schedule has at least one step"

    def at(self, step: int) -> tuple[float, ...]:
        """The weights of an optimizer step, the first of which is 1.

        >>> plan = WeightPlan(weights=(1.0, 1.0, 1.0), schedule="forward_curriculum", steps=6)
        >>> [plan.at(step) for step in (2, 3, 5, 9)]
        [(1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)]
        >>> plan = WeightPlan(weights=(1.0, 0.5, 0.25), schedule="fade", steps=6)
        >>> [plan.at(step) for step in (1, 2, 3, 4, 5)]
        [(1.0, 0.5, 0.25), (1.0, 0.5, 0.125), (1.0, 0.5, 0.0), (1.0, 0.25, 0.0), (1.0, 0.0, 0.0)]
        """
        assert step >= 1, "optimizer steps count from 1"
        if self.schedule not in CURRICULA:
            return self._scaled(self._strength(step))
        active = self.active_offsets(step)
        weights = [weight if offset <= active else 0.0 for offset, weight in enumerate(self.weights, start=1)]
        if self.schedule == "fade" and active > 1:
            stages_done = (step - 1) * len(self.weights) % self.steps / self.steps
            weights[active - 1] *= 1 - stages_done
        return tuple(weights)

    def active_offsets(self, step: int) -> int:
        """The offsets from 1 on that a curriculum trains at a step; N without one."""
        num_offsets = len(self.weights)
        stage = (step - 1) * num_offsets // self.steps
        if self.schedule == "forward_curriculum":
            return min(num_offsets, 1 + stage)
        if self.schedule in CURRICULA:
            return max(1, num_offsets - stage)
        return num_offsets

    @property
    def heads_may_rest(self) -> bool:
        """Whether some step gives an offset no weight, so that parameters stay without a gradient."""
        resting = self.schedule in CURRICULA and len(self.weights) > 1
        return resting or 0.0 in self.weights or (self.schedule == "step" and self.after == 0)

    def switches(self) -> tuple[tuple[int, int], ...]:
        """(step, active offsets) at which a curriculum changes them, the first step included.

        >>> WeightPlan(weights=(1.0,) * 3, schedule="reverse_curriculum", steps=10).switches()
        ((1, 3), (5, 2), (8, 1))
        """
        num_offsets = len(self.weights)
        found: list[tuple[int, int]] = []
        for stage in range(num_offsets):
            # the first step whose stage is this one
            step = 1 + math.ceil(stage * self.steps / num_offsets)
            active = self.active_offsets(step)
            if not found or found[-1][1] != active:
                found.append((step, active))
        return tuple(found)

    def describe(self) -> str | None:
        """One line for a person: what changes when; None where nothing does."""
        if self.schedule == "constant":
            return None
        if self.schedule in CURRICULA:
            stages = ", ".join(f"{active} from step {step}" for step, active in self.switches())
            return f"loss weights: {self.schedule}, trained offsets: {stages}"
        first, last = (" ".join(f"{weight:.4g}" for weight in self.at(step)) for step in (1, self.steps + 1))
        return f"loss weights: {self.schedule}, {first} at step 1, {last} from step {self.steps + 1} on"

    def _strength(self, step: int) -> float:
        if self.schedule == "step":
            return 1.0 if step <= self.steps else self.after
        done = min(1.0, step / self.steps)
        if self.schedule == "linear":
            return done
        return math.sin(math.pi / 2 * done) if self.schedule == "sine" else 1.0

    def _scaled(self, strength: float) -> tuple[float, ...]:
        return (self.weights[0], *(weight * strength for weight in self.weights[1:]))
