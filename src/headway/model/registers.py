"""Register tokens beside a row: each predicts a token farther ahead, and no ordinary token sees one.

Legend: B batch, T positions, D width.

    x_1 r_1 x_2 r_2 ... x_T r_T          register r_t predicts x_{t+d}, d drawn from 1..d_max for each row

r_t is a learned embedding at the position of the token before its target, t + d - 1, and sees what x_t sees and itself.
Attention knows order from positions and mask alone, so the registers are put behind the row instead of between its tokens:
the T tokens stay what they are without registers, and the heads read them alone.

Source: MuToR, "Multi-Token prediction needs registers" (arXiv:2505.10518).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headway.errors import ConfigError
from headway.functional.targets import IGNORE_INDEX, document_keys, shift_targets
from headway.heads.auxiliary import RegisterTokens
from headway.heads.base import HeadInputs
from headway.heads.lanes import at_positions, named
from headway.model.documents import (
    AttentionMask,
    as_mask,
    check_pair_masks,
    masks_by_layer_type,
    visible_pairs,
    within_window,
)

if TYPE_CHECKING:
    from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class Registers:
    """One pass with registers.

    Attributes:
        arguments: for the family's forward, over 2T positions.
        length: T.
        distances_B: d of each row.
    """

    arguments: dict[str, Any]
    length: int
    distances_B: Tensor

    def split(self, hidden_BXD: Tensor) -> tuple[Tensor, Tensor]:
        """States of the tokens, and of the registers."""
        return hidden_BXD[:, : self.length], hidden_BXD[:, self.length :]

    def without(self, inputs: HeadInputs, layer: nn.Module) -> HeadInputs:
        """What the heads would be offered without registers.

        Args:
            inputs: of the pass.
            layer: whose call they hold.
        """
        call = named(inputs.call, layer)
        mask = call.kwargs["attention_mask"][:, :, : self.length, : self.length]
        columns_T = torch.arange(self.length, device=inputs.hidden_BTD.device)
        return replace(
            inputs,
            hidden_BTD=self.split(inputs.hidden_BTD)[0],
            call=at_positions(call, columns_T, mask),
            spliced=tuple(self.split(hidden_BXD)[0] for hidden_BXD in inputs.spliced),
        )

    def targets(self, labels_BT: Tensor, **where: Tensor | None) -> Tensor:
        """What each register predicts [B, T]; `where` as for `shift_targets`."""
        targets_BT = torch.full_like(labels_BT, IGNORE_INDEX)
        for distance in sorted(set(self.distances_B.tolist())):
            shifted_BT = shift_targets(labels_BT, offset=distance, **where)
            targets_BT = torch.where(self.distances_B[:, None] == distance, shifted_BT, targets_BT)
        return targets_BT


def registers_beside(
    model: MultiTokenLM,
    embedded_BTD: Tensor,
    attention_mask: AttentionMask,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
) -> Registers:
    """Draw the distances and lay out the pass.

    Args:
        model: with `auxiliary="mutor"`.
        embedded_BTD: the tokens.
        attention_mask: 1 for tokens, 0 for padding [B, T], or None.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.

    Raises:
        ConfigError: a ready-made mask, or an attention implementation that takes no mask per token pair.
    """
    auxiliary = model.heads.auxiliary
    assert isinstance(auxiliary, RegisterTokens)
    check_pair_masks(model.config, "register tokens (auxiliary='mutor')")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        raise ConfigError(
            "register tokens (auxiliary='mutor') build the mask themselves: got a ready-made one; pass a mask [batch, "
            "positions] of tokens and padding, with position_ids or document_ids where documents are packed"
        )
    batch, length, device = embedded_BTD.shape[0], embedded_BTD.shape[1], embedded_BTD.device
    index_T = torch.arange(length, device=device)
    positions_BT = (index_T[None] if position_ids_BT is None else position_ids_BT).expand(batch, length)
    where = {"position_ids_BT": position_ids_BT, "document_ids_BT": document_ids_BT}
    distances_B = auxiliary.distances(batch, model.mtp_config.register_distance).to(device)
    registers = Registers({}, length, distances_B)
    # A register without a target stays at its token's position, which the model surely has.
    has_target_BT = registers.targets(torch.zeros_like(positions_BT), **where) != IGNORE_INDEX
    registers_BT = positions_BT + torch.where(has_target_BT, distances_B[:, None] - 1, 0)
    keys = document_keys((batch, length), **where, device=device)
    visible_BTT = visible_pairs((batch, length), keys, attention_mask_BT=attention_mask, device=device)

    def build(window: int | None) -> Tensor:
        tokens_BTT = within_window(visible_BTT, window)
        seen_BXX = tokens_BTT.new_zeros(batch, 2 * length, 2 * length)
        seen_BXX[:, :length, :length] = tokens_BTT
        seen_BXX[:, length:, :length] = tokens_BTT
        seen_BXX[:, length:, length:] = torch.eye(length, dtype=torch.bool, device=device)
        return as_mask(model.config, seen_BXX[:, None], dtype=embedded_BTD.dtype)

    arguments = {
        "input_ids": None,
        "inputs_embeds": auxiliary.beside(embedded_BTD),
        "position_ids": torch.cat((positions_BT, registers_BT), dim=1),
        "attention_mask": masks_by_layer_type(model.config, build),
        "past_key_values": None,
        "use_cache": False,
    }
    return replace(registers, arguments=arguments)
