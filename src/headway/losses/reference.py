"""The multi-token loss written as its definition: every logit alive at once.

Legend: B batch, T positions, D width, V vocabulary, N future tokens.

Use it to check the fast path, never to train: it holds N tensors [B, T, V] and differentiates them with autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.functional.targets import IGNORE_INDEX, shift_targets
from headway.losses.objective import TrainingObjective


def reference_loss(
    hidden_per_offset: Sequence[Tensor],
    weight_VD: Tensor | Sequence[Tensor],
    labels_BT: Tensor,
    *,
    offset_weights: Sequence[float] | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
    logits_transform: Callable[[Tensor], Tensor] | None = None,
    objective: TrainingObjective | None = None,
    teacher_logits_BTV: Tensor | None = None,
) -> Tensor:
    """Sum over offsets of weight x mean negative log-likelihood over that offset's valid targets, in nats.

    Args:
        hidden_per_offset: N tensors [B, T, D], item k-1 predicts the token k ahead.
        weight_VD: the unembedding shared by all offsets, or one per offset.
        labels_BT: unshifted token ids; -100 is ignored.
        offset_weights: N factors; all 1 in the paper.
        position_ids_BT: see `shift_targets`.
        document_ids_BT: see `shift_targets`.
        attention_mask_BT: see `shift_targets`.
        logits_transform: what the family does to its logits (soft-capping, scaling).
        objective: a divergence for offsets beyond the next token (for all of them with `distill_next_token`).
        teacher_logits_BTV: of the next token; those of the model's own offset 1 where another teacher is not given.

    Returns:
        Scalar; an offset without targets contributes 0.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2, L_n; weights and normalisation are ours (the paper sums).
    """
    total = hidden_per_offset[0].new_zeros(())
    for offset, hidden_BTD in enumerate(hidden_per_offset, start=1):
        targets_BT = shift_targets(
            labels_BT,
            offset=offset,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            attention_mask_BT=attention_mask_BT,
        )
        logits_BTV = hidden_BTD @ (weight_VD if isinstance(weight_VD, Tensor) else weight_VD[offset - 1]).T
        if logits_transform is not None:
            logits_BTV = logits_transform(logits_BTV)
        if logits_BTV.dtype != torch.float64:
            logits_BTV = logits_BTV.float()
        if offset == 1 and teacher_logits_BTV is None:
            teacher_logits_BTV = logits_BTV
        summed = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        if objective is not None and objective.distills and (offset > 1 or objective.distill_next_token):
            assert teacher_logits_BTV is not None
            own = reference_divergence(logits_BTV, teacher_logits_BTV, targets_BT, offset=offset, objective=objective)
            summed = objective.cross_entropy_share * summed + (1 - objective.cross_entropy_share) * own
        weight = 1.0 if offset_weights is None else offset_weights[offset - 1]
        total = total + weight * summed / (targets_BT != IGNORE_INDEX).sum().clamp(min=1)
    return total


def reference_divergence(
    logits_BTV: Tensor, teacher_logits_BTV: Tensor, targets_BT: Tensor, *, offset: int, objective: TrainingObjective
) -> Tensor:
    """Sum over positions t that have a target of the divergence between q at t and the teacher's p at t + offset - 1.

    Args:
        logits_BTV: of the head of this offset.
        teacher_logits_BTV: of the next token; no gradient flows into them.
        targets_BT: -100 where a position is left out.
        offset: from 1.
        objective: which divergence, at which temperature.

    Source: LK losses (arXiv:2602.23881): a = sum min(p, q); -log a; exp(-3 a) KL + (1 - exp(-3 a)) (1 - a).
    """
    total = logits_BTV.new_zeros(())
    for row, position in (targets_BT != IGNORE_INDEX).nonzero().tolist():
        q = torch.softmax(logits_BTV[row, position] / objective.temperature, dim=-1)
        p = torch.softmax(teacher_logits_BTV[row, position + offset - 1].detach() / objective.temperature, dim=-1)
        acceptance = torch.minimum(p, q).sum()
        kl = (p * (p.log() - q.log())).sum()
        weight = torch.exp(-3 * acceptance.detach())
        total = (
            total
            + {
                "kl": kl,
                "reverse_kl": (q * (q.log() - p.log())).sum(),
                "total_variation": (p - q).abs().sum() / 2,
                "log_acceptance": -acceptance.log(),
                "hybrid": weight * kl + (1 - weight) * (p - q).abs().sum() / 2,
            }[objective.divergence]
        )
    return total
