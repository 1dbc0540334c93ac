"""Drafts of every position at once: what heads would compute, had each position begun a draft.

Legend: B batch, T positions, X = k T positions of a pass with k lanes, D width, K drafted offsets.

A draft that starts at position t knows the tokens up to t + 1. Depth k (offset k + 1) reads at position t - j the token at
t - j + k. For j >= k - 1 that token is known and the state is the teacher-forced one, the same for every start; for
j <= k - 2 it is a draft of this start. Depth k therefore runs on k lanes of T states side by side: the teacher-forced one,
and for j = k - 2, ..., 0 the states at t - j of all starts t. Lane j sees, for its start, teacher-forced states up to
t - (k - 1) and the lanes between: the diagonal attention of EAGLE-3's training-time test, with the entries that headway's
decoder really has (`headway.heads.sequential`). Work and memory of depth k are those of a row k times as long.

Source: EAGLE-3 (arXiv:2503.01840), section 3.2 and Figure 6.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from headway.errors import ConfigError
from headway.heads.base import LayerCall
from headway.heads.call_arguments import MASK, at_columns, by_name, select


def named(call: LayerCall, layer: nn.Module) -> LayerCall:
    """The same call with every argument but the hidden states by name."""
    return replace(call, args=(), kwargs=by_name(layer, call.args, call.kwargs))


def at_positions(call: LayerCall, columns_X: Tensor, mask: Tensor | None) -> LayerCall:
    """A call with named arguments, at other positions of the same rows and under another mask.

    Args:
        call: of a layer on [B, T, D].
        columns_X: which of the T positions stands at each of the X new ones.
        mask: [B, 1, X, X] of the kind that the call had, or None.

    Raises:
        ConfigError: a family whose layers get per-position arguments that are not known here.
    """
    instead = "train the heads on the text (train_on_drafts=False), without registers"
    kwargs = at_columns(call.kwargs, columns_X, mask, instead=instead)
    return replace(call, hidden_BTD=select(call.hidden_BTD, columns_X), kwargs=kwargs)


class Lanes:
    """The calls of one layer with 1, 2, ... lanes, made from its call on the text."""

    def __init__(self, call: LayerCall, layer: nn.Module) -> None:
        """Prepare from the call on the text.

        Raises:
            ConfigError: an attention implementation that takes no mask per token pair.
        """
        self._call = named(call.without_cache(), layer)
        mask = self._call.kwargs.get(MASK)
        if mask is not None and mask.ndim != 4:
            raise ConfigError(
                f"train_on_drafts needs a mask per token pair: got one of shape {tuple(mask.shape)}; load the model with "
                f"attn_implementation='sdpa'"
            )
        length = call.hidden_BTD.shape[1]
        self._positions_T = torch.arange(length, device=call.hidden_BTD.device)
        self._additive = mask.dtype if mask is not None and mask.dtype.is_floating_point else None
        if mask is None:
            self._allowed_BTT = (self._positions_T[None, :] <= self._positions_T[:, None])[None]
        else:
            self._allowed_BTT = (mask[:, 0] == 0) if self._additive else mask[:, 0]

    def call(self, count: int) -> LayerCall:
        """The call at depth `count`: the teacher-forced lane, then lanes count - 2, ..., 0."""
        if count == 1:
            return self._call
        order = list(range(count - 2, -1, -1))
        columns = [self._positions_T, *((self._positions_T - back).clamp(min=0) for back in order)]
        return at_positions(self._call, torch.cat(columns), self._mask(order))

    def _mask(self, order: list[int]) -> Tensor:
        allowed_BTT, position_T = self._allowed_BTT, self._positions_T
        batch, length = allowed_BTT.shape[0], allowed_BTT.shape[1]
        count = len(order) + 1
        seen_BXX = allowed_BTT.new_zeros(batch, count * length, count * length)
        blocks = seen_BXX.view(batch, count, length, count, length)
        blocks[:, 0, :, 0] = allowed_BTT
        known_TT = position_T[None, :] <= position_T[:, None] - (count - 1)
        for row, back in enumerate(order, start=1):
            # Row t of this lane stands at position t - back; rows without such a position see only themselves.
            of_lane_BTT = allowed_BTT.roll(back, dims=1)
            blocks[:, row, :, 0] = of_lane_BTT & known_TT
            for column, other in enumerate(order[:row], start=1):
                own_BT = blocks[:, row, :, column].diagonal(dim1=1, dim2=2)
                own_BT[:, other:] = of_lane_BTT.diagonal(offset=-other, dim1=1, dim2=2)
            blocks[:, row, :, row].diagonal(dim1=1, dim2=2).fill_(True)
        mask_B1XX = seen_BXX[:, None]
        if self._additive is None:
            return mask_B1XX
        lowest = torch.finfo(self._additive).min
        return torch.zeros_like(mask_B1XX, dtype=self._additive).masked_fill_(~mask_B1XX, lowest)
