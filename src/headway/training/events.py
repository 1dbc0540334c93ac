"""What a run tells its watchers: plain records, so that the loop knows neither screens nor files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.training.data_mix import SourceShare


@dataclass(frozen=True)
class RunStarted:
    """Everything is in place and the first step is next.

    Attributes:
        first_step: the step that comes next; 1, or more after a resume.
        steps: of the whole run.
        tokens_per_step: input tokens of one optimizer step.
        num_future_tokens: offsets in every step's `loss_per_offset`.
        parameters: trained weights, tied ones once; None where nobody counted.
        flops_per_token: floating-point operations of the model for one training token (`headway.training.flops`); None where
            they could not be counted.
        peak_flops_per_second: of all devices together; None where it is not known.
    """

    first_step: int
    steps: int
    tokens_per_step: int
    num_future_tokens: int
    parameters: int | None = None
    flops_per_token: int | None = None
    peak_flops_per_second: float | None = None


@dataclass(frozen=True)
class StepDone:
    """One optimizer step.

    Attributes:
        step: from 1.
        tokens: input tokens seen so far, all steps of the run.
        loss: weighted sum of the offsets' mean losses, nats where the objective is the cross-entropy; None where it was not
            finite.
        loss_per_offset: mean nats of each offset over the step's valid targets, None for one with weight 0; None where the
            loss was not finite.
        learning_rate: of the matrices.
        gradient_norm: before clipping; None where it or the loss was not finite.
        applied: False where the step was skipped for a non-finite loss or gradient.
        skipped_steps: skipped so far.
        tokens_per_second: since the last logged step, evaluations and checkpoints not counted.
        elapsed_seconds: of the whole run, resumes included, downtime not.
        auxiliary_loss: of the auxiliary objective, per next-token target and before its weight; None without one.
        logged: whether the step is one of those that metrics.jsonl holds; what stands below is None on other steps.
        accuracy_per_offset: share of each offset's targets in the step's own batch that no other token outscored.
        offset_weights: of the step's loss.
        flops: floating-point operations of the model so far; None where they could not be counted.
        mfu: model FLOP utilisation, the operations per second over the peak of all devices; None where the peak is not known.
        resident_bytes: memory of this process in RAM; None where the system does not say.
        gpu_peak_bytes: most memory that tensors of this process had on its GPU so far; None on a CPU.
        data_mix: shares of the sources so far beside those asked for; None without a mixture.
        objective_per_offset: like loss_per_offset, the mean of what is trained; None where no offset is distilled.
    """

    step: int
    tokens: int
    loss: float | None
    loss_per_offset: tuple[float | None, ...] | None
    learning_rate: float
    gradient_norm: float | None
    applied: bool
    skipped_steps: int
    tokens_per_second: float
    elapsed_seconds: float
    logged: bool
    accuracy_per_offset: tuple[float | None, ...] | None = None
    offset_weights: tuple[float, ...] | None = None
    flops: int | None = None
    mfu: float | None = None
    resident_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    data_mix: tuple[SourceShare, ...] | None = None
    objective_per_offset: tuple[float | None, ...] | None = None
    auxiliary_loss: float | None = None

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": self.loss,
            "loss_per_offset": None if self.loss_per_offset is None else list(self.loss_per_offset),
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "applied": self.applied,
            "skipped_steps": self.skipped_steps,
            "tokens_per_second": self.tokens_per_second,
            "elapsed_seconds": self.elapsed_seconds,
            "accuracy_per_offset": None if self.accuracy_per_offset is None else list(self.accuracy_per_offset),
            "offset_weights": None if self.offset_weights is None else list(self.offset_weights),
            "flops": self.flops,
            "mfu": self.mfu,
            "resident_bytes": self.resident_bytes,
            "gpu_peak_bytes": self.gpu_peak_bytes,
            "data_mix": None if self.data_mix is None else [asdict(share) for share in self.data_mix],
            "objective_per_offset": None if self.objective_per_offset is None else list(self.objective_per_offset),
            "auxiliary_loss": self.auxiliary_loss,
        }


@dataclass(frozen=True)
class EvaluationDone:
    """Figures of all evaluators after `step` steps, `tokens` training tokens and `flops` operations (see `StepDone`)."""

    step: int
    values: dict[str, Any]
    seconds: float
    tokens: int | None = None
    flops: int | None = None

    def record(self) -> dict[str, Any]:
        """The line of evaluations.jsonl."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            **self.values,
        }


@dataclass(frozen=True)
class CheckpointWritten:
    """A complete checkpoint of `step` steps lies at `path`."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class Notice:
    """One sentence that a person should see."""

    text: str


@dataclass(frozen=True)
class RunEnded:
    """The loop is over, finished or not; a display can close."""

    finished: bool


Event = RunStarted | StepDone | EvaluationDone | CheckpointWritten | Notice | RunEnded
Listener = Callable[[Event], None]
