"""Divergences of a head from a teacher, with gradients, chunk by chunk.

Legend: B batch, T positions, M = B*T rows, C rows of a chunk, D width, V vocabulary; p the teacher's probabilities, q the
head's, a = sum_v min(p(v), q(v)).

    divergence         value                          gradient with respect to q's logits
    kl                 sum p log(p/q)                  q - p
    reverse_kl         sum q log(q/p)                  q (log(q/p) - value)
    total_variation    1 - a                           q (s - sum q s) / 2,  s = sign(q - p)
    log_acceptance     -log a                          that of total_variation / a
    hybrid             w kl + (1-w) (1-a), w=exp(-3a)  w (..) + (1-w) (..), w a constant

a is the probability that a token drawn from q is accepted against p (Leviathan et al. 2023), so that total variation and
-log a train what decoding measures; with p a point mass, -log a is the cross-entropy.

Source: LK losses (arXiv:2602.23881); the plain definitions with autograd: `headway.losses.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.functional.logits import SoftCap
from headway.functional.targets import IGNORE_INDEX
from headway.losses.logit_chunk import LogitChunk
from headway.losses.objective import Divergence, TrainingObjective

HYBRID_DECAY = 3.0  # w = exp(-3 a), "lk_hybrid" of speculators


@dataclass(frozen=True)
class Teacher:
    """A next-token distribution at every position, as what its logits are made of; nothing of it is differentiated.

    Attributes:
        hidden_BTD: after its final norm. Position t gives the distribution of the token at t + 1.
        weight_VD: its unembedding; D may be another than the heads'.
        soft_cap: its logit soft-capping.
    """

    hidden_BTD: Tensor
    weight_VD: Tensor
    soft_cap: SoftCap

    def distribution(self, rows: slice, *, temperature: float, dtype: torch.dtype) -> Distribution:
        """Of some of the M rows."""
        logits_CV = self.hidden_BTD.flatten(0, 1)[rows] @ self.weight_VD.T
        return Distribution.of_logits(self.soft_cap(logits_CV.to(dtype)).div_(temperature))


@dataclass(frozen=True)
class Distribution:
    """Probabilities of a few rows and their logarithms."""

    log_CV: Tensor
    probabilities_CV: Tensor

    @classmethod
    def of_logits(cls, logits_CV: Tensor) -> Distribution:
        """The logits are overwritten by the log-probabilities."""
        logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
        probabilities_CV = logits_CV.exp()
        sum_C1 = probabilities_CV.sum(dim=1, keepdim=True)
        return cls(logits_CV.sub_(sum_C1.log()), probabilities_CV.div_(sum_C1))

    def __getitem__(self, rows: slice) -> Distribution:
        """Some of the rows."""
        return Distribution(self.log_CV[rows], self.probabilities_CV[rows])


@dataclass(frozen=True)
class ChunkValues:
    """Sums over the valid rows of a chunk.

    Attributes:
        value: of the trained loss.
        nats: of the cross-entropy with the text's tokens.
        correct: rows whose token no other outscores.
    """

    value: Tensor
    nats: Tensor
    correct: Tensor


BUFFERS = 4
"""[C, V] tensors alive at once: teacher and head, each with its logarithms. A chunk has so many times fewer rows."""


def distilled_chunk(
    targets_C: Tensor,
    chunk: LogitChunk,
    teacher: Distribution,
    *,
    objective: TrainingObjective,
    grad_hidden: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    factor: Tensor,
    wants_gradients: bool,
) -> ChunkValues:
    """One chunk of one offset, for `headway.losses.chunked`.

    Args:
        targets_C: tokens of the text, -100 where the row has none: it is left out, whatever the teacher says.
        chunk: the head's logits; overwritten.
        teacher: its distributions of the same tokens.
        objective: divergence, share of the cross-entropy and temperature.
        grad_hidden: see `LogitChunk.backward`.
        grad_weights: see `LogitChunk.backward`.
        factor: see `LogitChunk.backward`.
        wants_gradients: whether to fill them.
    """
    valid_C1 = (targets_C != IGNORE_INDEX)[:, None]
    labels_C1 = targets_C.clamp(min=0)[:, None]
    share, temperature = objective.cross_entropy_share, objective.temperature
    head = Distribution.of_logits(chunk.logits_CV)
    label_log_C1 = head.log_CV.gather(1, labels_C1)
    correct = ((label_log_C1 == head.log_CV.amax(dim=1, keepdim=True)) & valid_C1).sum()
    likely_CV = None
    if share and wants_gradients:
        likely_CV = head.probabilities_CV * share
        likely_CV.scatter_add_(1, labels_C1, torch.full_like(label_log_C1, -share))
    if temperature != 1:
        # A softmax does not see what is added to all logits: log-probabilities serve as logits.
        head = Distribution.of_logits(head.log_CV.div_(temperature))
    value_C1, grad_CV = _FORMULAS[objective.divergence](teacher, head)
    value_C1 = (1 - share) * value_C1 - share * label_log_C1
    if wants_gradients:
        grad_CV.mul_((1 - share) / temperature)
        if likely_CV is not None:
            grad_CV.add_(likely_CV)
        # A row without a target may belong to a teacher's padding, where anything may stand.
        grad_CV.masked_fill_(~valid_C1, 0)
        chunk.backward(grad_CV, grad_hidden=grad_hidden, grad_weights=grad_weights, factor=factor)
    return ChunkValues(
        value=value_C1.masked_fill(~valid_C1, 0).sum(),
        nats=-label_log_C1.masked_fill(~valid_C1, 0).sum(),
        correct=correct,
    )


def _rows_dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    """Row by row, [C, 1], without a third [C, V]."""
    with torch.autocast(left_CV.device.type, enabled=False):
        return torch.bmm(left_CV[:, None, :], right_CV[:, :, None])[:, :, 0]


# Each formula overwrites what the head's distribution holds and gives one of its two tensors back.


def _kl(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    ratio_CV = q.log_CV.neg_().add_(p.log_CV)
    return _rows_dot(p.probabilities_CV, ratio_CV), q.probabilities_CV.sub_(p.probabilities_CV)


def _reverse_kl(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    ratio_CV = q.log_CV.sub_(p.log_CV)
    value_C1 = _rows_dot(q.probabilities_CV, ratio_CV)
    return value_C1, ratio_CV.sub_(value_C1).mul_(q.probabilities_CV)


def _acceptance(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """a, and the gradient of 1 - a in place of log q; q's probabilities stay."""
    scratch_CV, probabilities_CV = q.log_CV, q.probabilities_CV
    # Summed, not 1 - |p - q| / 2: a small a keeps its digits.
    acceptance_C1 = torch.minimum(probabilities_CV, p.probabilities_CV, out=scratch_CV).sum(dim=1, keepdim=True)
    sign_CV = torch.sub(probabilities_CV, p.probabilities_CV, out=scratch_CV).sign_()
    mean_C1 = _rows_dot(probabilities_CV, sign_CV)
    return acceptance_C1, sign_CV.sub_(mean_C1).mul_(probabilities_CV).mul_(0.5)


def _total_variation(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    acceptance_C1, grad_CV = _acceptance(p, q)
    return 1 - acceptance_C1, grad_CV


def _log_acceptance(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    acceptance_C1, grad_CV = _acceptance(p, q)
    # Distributions without a common token in floating point: the loss is large and finite, its gradient 0.
    acceptance_C1 = acceptance_C1.clamp(min=torch.finfo(acceptance_C1.dtype).tiny)
    return -acceptance_C1.log(), grad_CV.div_(acceptance_C1)


def _hybrid(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    divergence_C1 = _rows_dot(p.probabilities_CV, q.log_CV.neg_().add_(p.log_CV))
    acceptance_C1, variation_CV = _acceptance(p, q)
    weight_C1 = torch.exp(-HYBRID_DECAY * acceptance_C1)
    value_C1 = weight_C1 * divergence_C1 + (1 - weight_C1) * (1 - acceptance_C1)
    difference_CV = q.probabilities_CV.sub_(p.probabilities_CV).mul_(weight_C1)
    return value_C1, difference_CV.add_(variation_CV.mul_(1 - weight_C1))


_FORMULAS: dict[Divergence, Callable[[Distribution, Distribution], tuple[Tensor, Tensor]]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "total_variation": _total_variation,
    "log_acceptance": _log_acceptance,
    "hybrid": _hybrid,
}
"""(p, q) -> (value [C, 1], its gradient with respect to q's logits [C, V])."""
