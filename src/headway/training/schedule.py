"""The learning rate of a step: linear warm-up, then cosine decay to a share of the peak."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, decay_ratio: float) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 1 to `steps`) uses.

    Warm-up rises from 1 / warmup_steps to 1 at step `warmup_steps`; the cosine then falls to `decay_ratio` at
    the last step. A pure function of the step, so that a schedule's state is the step itself.

    >>> [round(learning_rate_factor(step, steps=6, warmup_steps=2, decay_ratio=0.0), 3) for step in range(1, 7)]
    [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]

    Args:
        step: optimizer step, the first one is 1; beyond `steps` the factor stays at `decay_ratio`.
        steps: length of the whole schedule.
        warmup_steps: steps of warm-up, fewer than `steps`; 0 starts at the peak.
        decay_ratio: last learning rate over peak.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), appendix M and Table S13 (warmup, decay ratio); the start of
    the warm-up is not given there.
    """
    assert step >= 1, "optimizer steps count from 1"
    if step <= warmup_steps:
        return step / warmup_steps
    if step >= steps:
        return decay_ratio
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return decay_ratio + (1 - decay_ratio) * (1 + math.cos(math.pi * progress)) / 2
