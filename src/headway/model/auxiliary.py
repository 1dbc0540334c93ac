"""The loss of an auxiliary objective on one pass.

Legend: B batch, T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway.functional.targets import IGNORE_INDEX
from headway.heads.auxiliary import TokenOrderHead
from headway.losses.chunked import loss_of_targets
from headway.losses.token_order import AuxiliaryLoss, UpcomingTokens, token_order_loss
from headway.model.output import OffsetHiddenStates
from headway.model.registers import Registers

if TYPE_CHECKING:
    from headway.model.multi_token_lm import MultiTokenLM


def auxiliary_loss(
    model: MultiTokenLM,
    states: OffsetHiddenStates,
    labels_BT: Tensor,
    *,
    registers: Registers | None,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
    attention_mask_BT: Tensor | None,
    count: Tensor | int | None,
) -> AuxiliaryLoss:
    """Summed nats of the model's auxiliary objective per next-token target.

    Args:
        model: with an auxiliary objective.
        states: of the pass, with registers where the objective has them.
        labels_BT: unshifted token ids; -100 is ignored.
        registers: of the pass.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.
        attention_mask_BT: see `headway.functional.targets.shift_targets`.
        count: next-token targets of a whole optimizer step; None: those of this pass.
    """
    labels_BT = labels_BT.to(states.last_hidden_BTD.device)
    where = {
        "position_ids_BT": position_ids_BT,
        "document_ids_BT": document_ids_BT,
        "attention_mask_BT": attention_mask_BT,
    }
    upcoming = UpcomingTokens.of(labels_BT, **where)
    divisor = upcoming.scored_M.sum() if count is None else torch.as_tensor(count).reshape(-1)[0]
    if isinstance(model.heads.auxiliary, TokenOrderHead):
        return token_order_loss(
            states.last_hidden_BTD,
            model.heads.auxiliary.to_scores.weight,
            upcoming,
            window=model.mtp_config.order_window,
            count=divisor,
            chunk_tokens=model.mtp_config.loss_chunk_tokens,
        )
    assert registers is not None
    assert states.register_hidden_BTD is not None
    targets_BT = registers.targets(labels_BT, **where)
    loss = loss_of_targets(
        [states.register_hidden_BTD],
        model.family.lm_head.weight,
        targets_BT.view(1, -1),
        offset_weights=(1.0,),
        counts_N=divisor.view(1),
        soft_cap=model.family.soft_cap,
        chunk_tokens=model.mtp_config.loss_chunk_tokens,
    )
    number = (targets_BT != IGNORE_INDEX).sum()
    return AuxiliaryLoss(total=loss.total, mean=loss.per_offset_N[0], num_targets=number)
