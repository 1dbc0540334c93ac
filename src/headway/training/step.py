"""One optimizer step: the only place where gradients are made.

Legend: M micro-batches, B rows of a micro-batch, T positions, N future tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headway.data.loader import Batch
from headway.functional.targets import count_valid_targets
from headway.training.optimizers import TrainingOptimizer
from headway.training.parallel import Parallel
from headway.training.precision import Precision, forward_precision


@dataclass(frozen=True)
class StepOutcome:
    """What one step did.

    Attributes:
        loss: weighted sum over offsets of the objective's mean (nats of the cross-entropy) over the whole step; None where
            it was not finite.
        loss_per_offset: mean nats per offset over the whole step, whatever the objective; 0 where an offset had no target,
            None where its weight was 0; None for all where the loss was not finite.
        gradient_norm: before clipping; None where it or the loss was not finite.
        applied: whether parameters were updated; False for a non-finite loss or gradient.
        accuracy_per_offset: share of the whole step's targets of each offset that no other token outscored; None for an
            offset with weight 0; None for all where the loss was not finite or does not count them.
        objective_per_offset: like loss_per_offset, the objective's mean; None where no offset is distilled.
        auxiliary_loss: nats of the auxiliary objective per next-token target of the whole step, before its weight; None
            without one, or where the loss was not finite.
    """

    loss: float | None
    loss_per_offset: tuple[float | None, ...] | None
    gradient_norm: float | None
    applied: bool
    accuracy_per_offset: tuple[float | None, ...] | None = None
    objective_per_offset: tuple[float | None, ...] | None = None
    auxiliary_loss: float | None = None


def optimizer_step(
    model: Any,
    optimizer: TrainingOptimizer,
    micro_batches: Sequence[Batch],
    *,
    precision: Precision,
    gradient_clip: float | None,
    should_stop: Callable[[], bool] = lambda: False,
    offset_weights: Sequence[float] | None = None,
    parallel: Parallel | None = None,
) -> StepOutcome | None:
    """Accumulate gradients over micro-batches and update once.

    The loss of each offset is the mean over the valid targets of all micro-batches of all processes together, so the cut
    into micro-batches and processes changes neither loss nor gradients. Without a finite loss and gradient nothing is
    updated, in any process.

    Args:
        model: a `MultiTokenLM` in train mode.
        optimizer: with the step's learning rates set; its gradients are dropped afterwards.
        micro_batches: of the whole step, on the model's device; of this process, as many as every other one has.
        precision: of the forward; see `headway.training.precision`.
        gradient_clip: largest norm of the gradient; None does not clip.
        should_stop: asked before each micro-batch; it must say the same in every process.
        offset_weights: of this step's loss; None: the model's own. Parameters of heads that rest, whose offsets have weight 0,
            get no gradient, so the optimizer leaves them and their moments alone: no decay either.
        parallel: how the model is trained by several processes; None: by one.

    Returns:
        None where `should_stop` said so: nothing was updated and no gradient is left.
    """
    num_scored = model.num_future_tokens if offset_weights is None else len(offset_weights)
    counts_MN = target_counts(micro_batches, num_future_tokens=num_scored)
    parallel = parallel or Parallel(model)
    counts_N = parallel.processes.total(counts_MN.sum(dim=0))
    loss = torch.zeros((), device=counts_N.device, dtype=torch.float64)
    sums_N = torch.zeros(counts_N.shape, device=counts_N.device, dtype=torch.float64)
    correct_N, trained_N = torch.zeros_like(sums_N), torch.zeros_like(sums_N)
    auxiliary = torch.zeros_like(loss)
    for number, (batch, own_N) in enumerate(zip(micro_batches, counts_MN, strict=True), start=1):
        if should_stop():
            optimizer.zero_grad()
            return None
        with parallel.accumulating(last=number == len(micro_batches)):
            with forward_precision(model, precision):
                output = parallel.forward(
                    **batch.model_inputs(), num_valid_targets=counts_N, offset_weights=offset_weights
                )
            output.loss.backward()
        loss += output.loss.detach()
        auxiliary += torch.nan if output.auxiliary_loss is None else output.auxiliary_loss
        sums_N += output.loss_per_offset.double() * own_N
        # An objective without right and wrong tokens has no accuracy.
        correct_N += torch.nan if output.num_correct_per_offset is None else output.num_correct_per_offset
        trained_N += torch.nan if output.objective_per_offset is None else output.objective_per_offset.double() * own_N
    totals = parallel.processes.total(torch.cat([loss[None], auxiliary[None], sums_N, correct_N, trained_N]))
    loss, auxiliary, (sums_N, correct_N, trained_N) = totals[0], totals[1], totals[2:].chunk(3)
    outcome = _update(optimizer, parallel, loss=float(loss), gradient_clip=gradient_clip)
    if outcome.loss is None:
        return outcome
    # NaN is the loss of an offset that was not computed, and what an objective does not tell.
    per_offset, accuracy, trained = (
        tuple(None if math.isnan(mean) else mean for mean in (total_N / counts_N.clamp(min=1)).tolist())
        for total_N in (sums_N, correct_N.masked_fill(sums_N.isnan(), torch.nan), trained_N)
    )
    return replace(
        outcome,
        loss_per_offset=per_offset,
        accuracy_per_offset=accuracy if any(share is not None for share in accuracy) else None,
        objective_per_offset=trained if any(mean is not None for mean in trained) else None,
        auxiliary_loss=None if bool(auxiliary.isnan()) else float(auxiliary),
    )


def target_counts(batches: Sequence[Batch], *, num_future_tokens: int) -> Tensor:
    """Valid targets of each offset in each batch, int64 [M, N]; their sum over batches divides the step's loss."""
    return torch.stack(
        [
            count_valid_targets(
                batch.labels_BT,
                num_future_tokens=num_future_tokens,
                position_ids_BT=batch.position_ids_BT,
                document_ids_BT=batch.document_ids_BT,
            )
            for batch in batches
        ]
    )


def _update(
    optimizer: TrainingOptimizer, parallel: Parallel, *, loss: float, gradient_clip: float | None
) -> StepOutcome:
    """Clip and apply what has been accumulated, or drop it where loss or gradient are not finite."""
    norm = parallel.gradient_norm(optimizer.parameters) if math.isfinite(loss) else math.nan
    applied = math.isfinite(loss) and math.isfinite(norm)
    if applied:
        if gradient_clip is not None:
            parallel.clip_gradients(optimizer.parameters, limit=gradient_clip, norm=norm)
        optimizer.step()
    optimizer.zero_grad()
    return StepOutcome(
        loss=loss if math.isfinite(loss) else None,
        loss_per_offset=None,
        gradient_norm=norm if math.isfinite(norm) else None,
        applied=applied,
    )
