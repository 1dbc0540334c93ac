"""Drafts of sequential modules that branch: a depth runs over known positions and open nodes at once.

Legend: B rows, W known positions of a pass, X nodes of one level of a tree that go on, N those of all levels below the root
so far, S = W' + N positions of one call, D width.

Level 0 is the token that the base has just chosen, level i the i-th drafted token of a path. Depth k of the modules reads at
position p the token k places later, so a node of level i has its entry i - k + 1 positions after the last known one, reads
the state of its parent's entry at depth k - 1, and attends to the entries of the known tokens and of its path: what it would
be, were its path the text. The children of level k - 1 are scored by depth k. Of the W known positions depth k needs those
whose token is known, one fewer than the depth before, so with one node per level a call has W positions, as many as that of a
chain (`SequentialHeads.begin_draft`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headway.heads.base import DraftPlaces, DraftPoint, LayerCall

Deepen = Callable[[int, LayerCall, Tensor, Tensor], Tensor]
"""(depth, call, states at the depth before [B, S, D], embeddings [B, S, D]) -> states [B, S, D]."""


class PathDraft:
    """A draft whose nodes have entries of their own; see `headway.heads.base.DraftStep`."""

    def __init__(
        self, point: DraftPoint, places: DraftPlaces, hidden_BTD: Tensor, *, deepen: Deepen, layer: nn.Module
    ) -> None:
        """Start a draft.

        Args:
            point: of the draft.
            places: where keys and values go.
            hidden_BTD: what the first depth reads, at all positions of the pass.
            deepen: runs one depth.
            layer: a decoder layer of the family.
        """
        self._inputs = point.inputs
        self._places = places
        self._deepen = deepen
        self._layer = layer
        self._rows_B1 = torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device)[:, None]
        self._last_B1 = places.last_B[:, None]
        self._width = places.columns_BW.shape[1]
        self._known = self._width
        self._states_BSD = hidden_BTD[self._rows_B1, places.columns_BW]
        text_BW = point.tokens_BW[self._rows_B1, places.columns_BW]
        self._text_BC = torch.cat((text_BW, text_BW.new_zeros(text_BW.shape[0], 1)), dim=1)
        self._levels: list[int] = []
        self._tokens_BN = text_BW[:, :0]
        self._parents_BN = text_BW[:, :0]
        self._ancestors_BNN = torch.zeros(text_BW.shape[0], 0, 0, dtype=torch.bool, device=text_BW.device)

    def __call__(self, offset: int, tokens_BX: Tensor, parents_BX: Tensor | None) -> Tensor:
        """See `headway.heads.base.DraftStep`."""
        depth = offset - 1
        if depth == 1:
            self._text_BC[self._rows_B1, self._last_B1 + 1] = tokens_BX
        else:
            self._grow(depth - 1, tokens_BX, torch.zeros_like(tokens_BX) if parents_BX is None else parents_BX)
        known = max(0, self._width + 1 - depth)
        # The root's entry at the depth before; rows that have no such position have none that reads it.
        root_B1 = (self._last_B1 + 2 - depth).clamp(min=0)
        above_BN = torch.where(self._parents_BN < 0, root_B1, self._known + self._parents_BN)
        before_BSD = torch.cat((self._states_BSD[:, :known], self._states_BSD[self._rows_B1, above_BN]), dim=1)
        read_BS = torch.cat((self._text_BC[:, depth : depth + known], self._tokens_BN), dim=1)
        call = self._places.call(
            self._inputs.call,
            self._layer,
            depth=depth,
            known=known,
            levels=self._levels,
            ancestors_BNN=self._ancestors_BNN,
        )
        self._states_BSD = self._deepen(depth, call, before_BSD, self._inputs.embed(read_BS))
        self._known = known
        if depth == 1:
            return self._states_BSD[self._rows_B1, self._last_B1]
        return self._states_BSD[:, -tokens_BX.shape[1] :]

    def _grow(self, level: int, tokens_BX: Tensor, parents_BX: Tensor) -> None:
        """Take the open nodes of the next level in; parents are places among those of the level before."""
        before, new = len(self._levels), tokens_BX.shape[1]
        first = before - self._levels.count(level - 1)
        parents_BX = parents_BX + first if level > 1 else torch.full_like(tokens_BX, -1)
        seen_BMM = self._ancestors_BNN.new_zeros(tokens_BX.shape[0], before + new, before + new)
        seen_BMM[:, :before, :before] = self._ancestors_BNN
        if level > 1:
            seen_BMM[:, before:, :before] = self._ancestors_BNN[self._rows_B1, parents_BX]
        seen_BMM[:, before:, before:] = torch.eye(new, dtype=torch.bool, device=tokens_BX.device)
        self._ancestors_BNN = seen_BMM
        self._levels += [level] * new
        self._tokens_BN = torch.cat((self._tokens_BN, tokens_BX), dim=1)
        self._parents_BN = torch.cat((self._parents_BN, parents_BX), dim=1)
