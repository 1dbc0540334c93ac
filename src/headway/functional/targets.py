"""Which token each position must predict: the one place where labels are shifted.

Legend: B batch, T positions, N future tokens.

An offset k counts from 1: at position t, offset k predicts the token at t + k. The target exists only where t + k is in
the row, in the same document, not padding, and its label is not ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not a target (the Hugging Face convention)."""


def document_keys(
    shape: torch.Size | tuple[int, int],
    *,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
    device: torch.device,
) -> list[Tensor]:
    """Integer keys [B, T] such that two positions of a row are of one document iff all their keys agree.

    Position ids that advance by exactly the distance give equal `position - index`; document ids are a key as they are.
    An empty list means that every row is one document.

    >>> document_keys((1, 4), position_ids_BT=torch.tensor([[0, 1, 0, 1]]), document_ids_BT=None,
    ...               device=torch.device("cpu"))
    [tensor([[ 0,  0, -2, -2]])]

    Raises:
        ValueError: ids that do not have the shape [B, T] (or [1, T]).
    """
    batch, length = shape
    keys = []
    for name, ids in (("position_ids", position_ids_BT), ("document_ids", document_ids_BT)):
        if ids is None:
            continue
        if ids.ndim != 2 or ids.shape[1] != length or ids.shape[0] not in (1, batch):
            raise ValueError(
                f"{name} must have the shape of the tokens: got {tuple(ids.shape)}, tokens are {(batch, length)}; "
                f"pass one id per token"
            )
        ids_BT = ids.to(device=device, dtype=torch.long).expand(batch, length)
        if name == "position_ids":
            ids_BT = ids_BT - torch.arange(length, device=device)
        keys.append(ids_BT)
    return keys


def shift_targets(
    labels_BT: Tensor,
    *,
    offset: int,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
) -> Tensor:
    """Targets of one offset: position t holds the label of t + offset, or -100 where there is none.

    No target crosses a restart of the position ids or a change of the document ids, and none is read at or taken from a
    position that the attention mask excludes.

    >>> labels = torch.tensor([[10, 11, 12, 20, 21]])
    >>> shift_targets(labels, offset=2, document_ids_BT=torch.tensor([[0, 0, 0, 1, 1]]))
    tensor([[  12, -100, -100, -100, -100]])
    >>> shift_targets(labels, offset=1, position_ids_BT=torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[  11,   12, -100,   21, -100]])

    Args:
        labels_BT: unshifted token ids [B, T]; -100 is ignored.
        offset: how many tokens ahead, from 1.
        position_ids_BT: positions within each document; advance by 1 inside a document.
        document_ids_BT: any integers that differ between neighbouring documents.
        attention_mask_BT: 1 for tokens, 0 for padding.

    Returns:
        int64 [B, T] on the labels' device.

    Raises:
        ValueError: labels are not [B, T], an id tensor has another shape, or offset < 1.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), equation 2; boundaries are not described there.
    """
    if labels_BT.ndim != 2:
        raise ValueError(
            f"labels must have the shape [batch, positions]: got {tuple(labels_BT.shape)}; add a batch dimension"
        )
    if offset < 1:
        raise ValueError(f"offset counts from 1 (the next token): got {offset}; pass 1..num_future_tokens")
    batch, length = labels_BT.shape
    targets_BT = torch.full((batch, length), IGNORE_INDEX, dtype=torch.long, device=labels_BT.device)
    if offset >= length:
        return targets_BT
    keep = length - offset
    targets_BT[:, :keep] = labels_BT[:, offset:]
    allowed = torch.ones((batch, keep), dtype=torch.bool, device=labels_BT.device)
    for keys_BT in document_keys(
        (batch, length), position_ids_BT=position_ids_BT, document_ids_BT=document_ids_BT, device=labels_BT.device
    ):
        allowed &= keys_BT[:, offset:] == keys_BT[:, :keep]
    if attention_mask_BT is not None:
        if attention_mask_BT.shape != labels_BT.shape:
            raise ValueError(
                f"attention_mask must have the shape of the labels: got {tuple(attention_mask_BT.shape)}, labels are "
                f"{(batch, length)}; pass a 2-D mask of the same tokens"
            )
        present = attention_mask_BT.to(device=labels_BT.device).bool()
        allowed &= present[:, offset:] & present[:, :keep]
    targets_BT[:, :keep].masked_fill_(~allowed, IGNORE_INDEX)
    return targets_BT


def count_valid_targets(
    labels_BT: Tensor,
    *,
    num_future_tokens: int,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
) -> Tensor:
    """How many targets each offset has: int64 [N], item k-1 for offset k.

    Sum it over micro-batches and ranks and pass it to `MultiTokenLM.forward(num_valid_targets=...)` so that the loss is
    the mean over the whole optimizer step.

    >>> count_valid_targets(torch.tensor([[1, 2, 3, -100]]), num_future_tokens=3)
    tensor([2, 1, 0])
    """
    return torch.stack(
        [
            (
                shift_targets(
                    labels_BT,
                    offset=offset,
                    position_ids_BT=position_ids_BT,
                    document_ids_BT=document_ids_BT,
                    attention_mask_BT=attention_mask_BT,
                )
                != IGNORE_INDEX
            ).sum()
            for offset in range(1, num_future_tokens + 1)
        ]
    )
