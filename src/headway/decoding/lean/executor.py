"""The executor on lean layers: one reading of the unembedding for verification and draft together.

Legend: B rows, M positions of a block, N future tokens, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.decoding.draft_vocabulary import SlicedDrafts
from headway.decoding.executor import EagerExecutor, Nodes
from headway.decoding.lean.model import LeanModel
from headway.model.output import OffsetHiddenStates

MOST_ROWS_AT_ONCE = 32
"""B x M x N up to which one product with the unembedding is cheaper than two: the weights are read once instead of twice."""


class LeanExecutor(EagerExecutor):
    """`EagerExecutor` on a `LeanModel`.

    Where all offsets share the unembedding, one product gives the logits of every offset at every position, although
    only those at the last accepted position will be needed: up to `MOST_ROWS_AT_ONCE` rows a product takes as long as
    reading the weights does.
    """

    def __init__(self, model: LeanModel | SlicedDrafts, *args: Any, **kwargs: Any) -> None:
        """See `EagerExecutor`."""
        super().__init__(model, *args, **kwargs)
        heads = model.heads
        # One product over all offsets would read the rows that a draft vocabulary leaves out.
        whole = not isinstance(model, SlicedDrafts)
        self._at_once = heads.unembeddings is None and not heads.autoregressive and whole
        self._ahead: tuple[OffsetHiddenStates, Tensor] | None = None

    def _run(self, ids: Tensor, mask: Any, position_ids: Tensor, num_offsets: int) -> OffsetHiddenStates:
        states = super()._run(ids, mask, position_ids, num_offsets)
        self._ahead = None
        count = 1 + len(states.future_hidden)
        if self._at_once and count > 1 and ids.numel() * count <= MOST_ROWS_AT_ONCE:
            future_KBMD = torch.stack(states.future_hidden)
            if self._model.heads.uses_final_norm:
                future_KBMD = self._model.final_norm(future_KBMD)
            self._ahead = states, self._model.unembed(torch.cat((states.last_hidden_BTD[None], future_KBMD)))
        return states

    def logits(self, last_hidden_BMD: Tensor) -> Tensor:
        """See `EagerExecutor.logits`."""
        if self._ahead is not None and self._ahead[0].last_hidden_BTD is last_hidden_BMD:
            return self._ahead[1][0]
        return super().logits(last_hidden_BMD)

    def draft_logits(self, states: OffsetHiddenStates, nodes: Nodes, *, count: int) -> Tensor:
        """See `EagerExecutor.draft_logits`."""
        if self._ahead is None or self._ahead[0] is not states:
            return super().draft_logits(states, nodes, count=count)
        future_KBMV = self._ahead[1][1 : 1 + count]
        if not isinstance(nodes, Tensor) and len(set(nodes)) == 1:
            return future_KBMV[:, :, nodes[0]]
        return future_KBMV[:, self._rows_B, torch.as_tensor(nodes, device=self.device)]
