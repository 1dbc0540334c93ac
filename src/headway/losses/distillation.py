"""Divergences from a teacher's distribution to a head's, with their gradients, one chunk of logits at a time.

Legend: B batch, T positions, M = B*T rows, C rows of a chunk, D width, V vocabulary; p the teacher's probabilities, q the
head's, a = sum_v min(p(v), q(v)).

    divergence         value                          gradient with respect to log-probabilities' logits
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

    def log_probabilities(self, rows: slice, *, temperature: float, dtype: torch.dtype) -> Tensor:
        """[C, V] of some of the M rows."""
        logits_CV = self.hidden_BTD.flatten(0, 1)[rows] @ self.weight_VD.T
        logits_CV = self.soft_cap(logits_CV.to(dtype))
        return torch.log_softmax(logits_CV.div_(temperature), dim=-1)


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


def distilled_chunk(
    targets_C: Tensor,
    chunk: LogitChunk,
    teacher_log_CV: Tensor,
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
        chunk: the head's logits.
        teacher_log_CV: the teacher's log-probabilities of the same tokens.
        objective: divergence, share of the cross-entropy and temperature.
        grad_hidden: see `LogitChunk.backward`.
        grad_weights: see `LogitChunk.backward`.
        factor: see `LogitChunk.backward`.
        wants_gradients: whether to fill them.
    """
    valid_C1 = (targets_C != IGNORE_INDEX)[:, None]
    labels_C1 = targets_C.clamp(min=0)[:, None]
    share, temperature = objective.cross_entropy_share, objective.temperature
    largest_C1 = chunk.logits_CV.amax(dim=1, keepdim=True)
    correct = ((chunk.logits_CV.gather(1, labels_C1) == largest_C1) & valid_C1).sum()
    head_log_CV = torch.log_softmax(chunk.logits_CV, dim=-1)
    nll_C1 = -head_log_CV.gather(1, labels_C1)
    grad_CV = None
    if share and wants_gradients:
        grad_CV = head_log_CV.exp()
        grad_CV.scatter_add_(1, labels_C1, torch.full_like(nll_C1, -1.0))
        grad_CV.mul_(share)
    if temperature != 1:
        head_log_CV = torch.log_softmax(chunk.logits_CV / temperature, dim=-1)
    value_C1, own_CV = _FORMULAS[objective.divergence](teacher_log_CV, head_log_CV)
    value_C1 = share * nll_C1 + (1 - share) * value_C1
    if wants_gradients:
        own_CV = own_CV.mul_((1 - share) / temperature)
        grad_CV = own_CV if grad_CV is None else own_CV.add_(grad_CV)
        # A row without a target may belong to a teacher's padding, where anything may stand.
        grad_CV.masked_fill_(~valid_C1, 0)
        chunk.backward(grad_CV, grad_hidden=grad_hidden, grad_weights=grad_weights, factor=factor)
    return ChunkValues(
        value=value_C1.masked_fill(~valid_C1, 0).sum(),
        nats=nll_C1.masked_fill(~valid_C1, 0).sum(),
        correct=correct,
    )


def _kl(teacher_log_CV: Tensor, head_log_CV: Tensor) -> tuple[Tensor, Tensor]:
    teacher_CV = teacher_log_CV.exp()
    value_C1 = (teacher_CV * (teacher_log_CV - head_log_CV)).sum(dim=1, keepdim=True)
    return value_C1, head_log_CV.exp().sub_(teacher_CV)


def _reverse_kl(teacher_log_CV: Tensor, head_log_CV: Tensor) -> tuple[Tensor, Tensor]:
    head_CV = head_log_CV.exp()
    ratio_CV = head_log_CV - teacher_log_CV
    value_C1 = (head_CV * ratio_CV).sum(dim=1, keepdim=True)
    return value_C1, ratio_CV.sub_(value_C1).mul_(head_CV)


def _acceptance(teacher_log_CV: Tensor, head_log_CV: Tensor) -> tuple[Tensor, Tensor]:
    """a, and the gradient of 1 - a."""
    head_CV, teacher_CV = head_log_CV.exp(), teacher_log_CV.exp()
    acceptance_C1 = torch.minimum(head_CV, teacher_CV).sum(dim=1, keepdim=True)
    sign_CV = torch.sign(teacher_CV.neg_().add_(head_CV))
    mean_C1 = (head_CV * sign_CV).sum(dim=1, keepdim=True)
    return acceptance_C1, sign_CV.sub_(mean_C1).mul_(head_CV).mul_(0.5)


def _total_variation(teacher_log_CV: Tensor, head_log_CV: Tensor) -> tuple[Tensor, Tensor]:
    acceptance_C1, grad_CV = _acceptance(teacher_log_CV, head_log_CV)
    return 1 - acceptance_C1, grad_CV


def _log_acceptance(teacher_log_CV: Tensor, head_log_CV: Tensor) -> tuple[Tensor, Tensor]:
    acceptance_C1, grad_CV = _acceptance(teacher_log_CV, head_log_CV)
    # Distributions without a common token in floating point: the loss is large and finite, its gradient 0.
    acceptance_C1 = acceptance_C1.clamp(min=torch.finfo(acceptance_C1.dtype).tiny)
    return -acceptance_C1.log(), grad_CV.div_(acceptance_C1)


def _hybrid(teacher_log_CV: Tensor, head_log_CV: Tensor) -> tuple[Tensor, Tensor]:
    divergence_C1, grad_CV = _kl(teacher_log_CV, head_log_CV)
    acceptance_C1, variation_CV = _acceptance(teacher_log_CV, head_log_CV)
    weight_C1 = torch.exp(-HYBRID_DECAY * acceptance_C1)
    value_C1 = weight_C1 * divergence_C1 + (1 - weight_C1) * (1 - acceptance_C1)
    return value_C1, grad_CV.mul_(weight_C1).add_(variation_CV.mul_(1 - weight_C1))


_FORMULAS: dict[Divergence, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "total_variation": _total_variation,
    "log_acceptance": _log_acceptance,
    "hybrid": _hybrid,
}
"""(log p, log q) -> (value [C, 1], its gradient with respect to q's logits [C, V])."""
