"""How long a step will take: operations at an assumed share of the peak, and the optimizer's traffic."""

from __future__ import annotations

from dataclasses import dataclass

from headway.training.devices import Device

# The optimizer reads weight and gradient, reads and writes each moment, writes the weight.
_ACCESSES = 3
_ACCESSES_PER_MOMENT = 2
# A layer that is recomputed runs forward twice: 4 instead of 3 forwards' worth of operations.
_RECOMPUTING = 4 / 3


@dataclass(frozen=True)
class StepTime:
    """An estimate; what devices exchange is assumed to be hidden behind what they compute.

    Attributes:
        compute_seconds: of forward and backward.
        optimizer_seconds: of the update.
        tokens_per_second: of all devices together.
        exchanged_bytes: that each device sends in a step.
        run_seconds: of all steps, evaluations and checkpoints not counted; None where the steps are not known.
    """

    compute_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    exchanged_bytes: int
    run_seconds: float | None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute_seconds + self.optimizer_seconds


def estimate_step_time(
    device: Device,
    *,
    flops_per_token: int,
    tokens: int,
    processes: int,
    weight_bytes: int,
    optimizer_bytes: int,
    gradient_checkpointing: bool,
    exchanged_bytes: int,
    steps: int | None,
) -> StepTime:
    """The time of a step.

    Args:
        device: each of the devices.
        flops_per_token: of forward and backward, nothing recomputed.
        tokens: of the step, all devices together.
        processes: devices.
        weight_bytes: that one device updates: its part with fsdp.
        optimizer_bytes: moments that one device updates.
        gradient_checkpointing: whether layers run forward twice.
        exchanged_bytes: that each device sends in a step.
        steps: of the run.
    """
    operations = flops_per_token * tokens / processes * (_RECOMPUTING if gradient_checkpointing else 1.0)
    compute = operations / (device.flops_per_second * device.assumed_mfu)
    optimizer = (_ACCESSES * weight_bytes + _ACCESSES_PER_MOMENT * optimizer_bytes) / device.bytes_per_second
    seconds = compute + optimizer
    return StepTime(compute, optimizer, tokens / seconds, exchanged_bytes, None if steps is None else steps * seconds)
