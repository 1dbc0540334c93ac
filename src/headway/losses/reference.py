"""The multi-token loss written as its definition: every logit alive at once.

Legend: B batch, T positions, D width, V vocabulary, N future tokens.

Use it to check the fast path, never to train: it holds N tensors [B, T, V].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.functional.targets import IGNORE_INDEX, shift_targets


def reference_loss(
    hidden_per_offset: Sequence[Tensor],
    weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    offset_weights: Sequence[float] | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
    logits_transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Sum over offsets of weight x mean negative log-likelihood over that offset's valid targets, in nats.

    Args:
        hidden_per_offset: N tensors [B, T, D], item k-1 predicts the token k ahead.
        weight_VD: the unembedding shared by all offsets.
        labels_BT: unshifted token ids; -100 is ignored.
        offset_weights: N factors; all 1 in the paper.
        position_ids_BT: see `shift_targets`.
        document_ids_BT: see `shift_targets`.
        attention_mask_BT: see `shift_targets`.
        logits_transform: what the family does to its logits (soft-capping, scaling).

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
        logits_BTV = hidden_BTD @ weight_VD.T
        if logits_transform is not None:
            logits_BTV = logits_transform(logits_BTV)
        if logits_BTV.dtype != torch.float64:
            logits_BTV = logits_BTV.float()
        summed = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        weight = 1.0 if offset_weights is None else offset_weights[offset - 1]
        total = total + weight * summed / (targets_BT != IGNORE_INDEX).sum().clamp(min=1)
    return total
