"""What all lean layers of one forward share: where its positions stand and what they see.

Legend: B rows, M positions of one forward, S visible slots, C positions of the rotary tables, r rotated width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.decoding.masks import ChainMasks


@dataclass
class LeanPass:
    """One forward.

    Attributes:
        rotary: cos [C, r] as the family's own rotary embedding gives it, and sin likewise, its first half negated.
        position_ids_BM: rows of these tables, [B or 1, M].
        masks: per attention window an additive mask [B or 1, 1, M, S]; `ChainMasks` where every position sees its own slot and
            those before it; None where every query sees all visible slots. An empty mapping is a causal pass from slot 0.
        cache: of `headway.decoding.cache`; None attends within the pass.
    """

    rotary: tuple[Tensor, Tensor]
    position_ids_BM: Tensor
    masks: dict[int | None, Tensor | ChainMasks | None]
    cache: Any
    _places: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    # No cached_property: before Python 3.12 it takes a lock, which torch.compile cannot trace.
    _cos_sin: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def mask(self, window: int | None) -> Tensor | None:
        """[B or 1, 1, M, S] of a window, made where it was not yet; None where nothing is hidden."""
        mask = self.masks[window]
        return mask.of(window) if isinstance(mask, ChainMasks) else mask

    @property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """Both at the positions of the pass, [B or 1, M, 1, r]: gathered once for all layers, with an axis for heads."""
        if self._cos_sin is None:
            cos_Cr, sin_Cr = self.rotary
            self._cos_sin = cos_Cr[self.position_ids_BM][:, :, None], sin_Cr[self.position_ids_BM][:, :, None]
        return self._cos_sin

    def places(self, batch: int) -> tuple[Tensor, Tensor]:
        """Slots and positions, int64 [B, M] each, one row after the other."""
        if self._places is None:
            positions = self.position_ids_BM.shape[1]
            slots_BM = self.cache.slots_BM
            if slots_BM is None:
                begin = self.cache.position
                slots_BM = torch.arange(begin, begin + positions, device=self.position_ids_BM.device)[None]
            whole = (batch, positions)
            self._places = slots_BM.expand(whole).contiguous(), self.position_ids_BM.expand(whole).contiguous()
        return self._places
