"""The paper's own schedule: forward and backward head by head (Gloeckle et al. 2024, Figure 2).

For comparison on one process. Peak memory holds one head's logits and activations at a time; under DDP and FSDP2 the
nested backward passes desynchronise gradients, so training uses `headway.losses.chunked` instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headway.functional.targets import shift_targets
from headway.losses.chunked import loss_of_targets
from headway.model.documents import isolating_mask
from headway.model.multi_token_lm import MultiTokenLM


def backward_per_head(
    model: MultiTokenLM,
    input_ids_BT: Tensor,
    labels_BT: Tensor,
    *,
    attention_mask_BT: Tensor | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Accumulate the gradients of the multi-token loss one head after the other.

    Equal to `model(input_ids, labels=labels).loss.backward()`: same value, same gradients added to `.grad`. Order, for
    n = 2: trunk forward, head 1 forward, head 1 backward, head 2 forward, head 2 backward, trunk backward.

    Args:
        model: the multi-token model, not wrapped by DDP or FSDP.
        input_ids_BT: tokens.
        labels_BT: unshifted token ids; -100 is ignored.
        attention_mask_BT: 1 for tokens, 0 for padding.
        position_ids_BT: positions within each document.
        document_ids_BT: ids that differ between neighbouring documents.
        kwargs: for the base's own forward.

    Returns:
        The loss, detached.

    Raises:
        ValueError: labels or ids of a wrong shape.
        DataError: a label outside the vocabulary.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2, Figure 2.
    """
    family, num_future_tokens = model.family, model.num_future_tokens
    mask = isolating_mask(
        model.config,
        shape=(input_ids_BT.shape[0], input_ids_BT.shape[1]),
        dtype=family.lm_head.weight.dtype,
        device=input_ids_BT.device,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
    )
    weights = model.mtp_config.offset_weights or (1.0,) * num_future_tokens

    def head_loss(hidden_BTD: Tensor, offset: int) -> Tensor:
        targets_BT = shift_targets(
            labels_BT,
            offset=offset,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            attention_mask_BT=attention_mask_BT,
        )
        return loss_of_targets(
            [hidden_BTD],
            family.lm_head.weight,
            targets_BT.view(1, -1),
            offset_weights=(weights[offset - 1],),
            soft_cap=family.soft_cap,
            chunk_tokens=model.mtp_config.loss_chunk_tokens,
        ).total

    with model._tap.armed(cut=True) as tap:
        hidden_BTD = family.decoder(
            input_ids=input_ids_BT, attention_mask=mask, position_ids=position_ids_BT, use_cache=False, **kwargs
        )[0]
        call, leaf_BTD = tap.call, tap.leaf_BTD
    loss = head_loss(hidden_BTD, 1)
    loss.backward()  # type: ignore[no-untyped-call]
    total = loss.detach()
    del hidden_BTD, loss
    for offset, head in enumerate(model.heads, start=2):
        loss = head_loss(model.final_norm(call.replay(head, leaf_BTD)), offset)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
        del loss
    if call.hidden_BTD.requires_grad and leaf_BTD.grad is not None:
        call.hidden_BTD.backward(leaf_BTD.grad)  # type: ignore[no-untyped-call]
    return total
