"""The executor on lean layers: one reading of the unembedding for verification and draft together.

Legend: B rows, M positions of a block, N future tokens, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.decoding.draft_vocabulary import SlicedDrafts
from headway.decoding.executor import EagerExecutor
from headway.decoding.head_reader import Nodes
from headway.decoding.lean.few_rows import MOST_ROWS
from headway.decoding.lean.markov import LeanMarkov
from headway.decoding.lean.model import LeanModel
from headway.decoding.lean.native import has_tiles
from headway.decoding.masks import ChainMasks
from headway.model.output import OffsetHiddenStates

MOST_ROWS_AT_ONCE = 32
"""B x M x N up to which one product with the unembedding is cheaper than two where rows cost next to nothing (AMX tiles)."""

MOST_PAID_ROWS_AT_ONCE = 4
"""The same where every row costs its arithmetic."""


class LeanExecutor(EagerExecutor):
    """`EagerExecutor` on a `LeanModel`.

    Where all offsets share the unembedding and rows are cheap, one product gives the logits of every offset at every
    position, although only those at the last accepted position will be needed: the weights are then read once, not twice.

    Attributes:
        way: how products are made (`headway.decoding.lean.linear`).
    """

    def __init__(self, model: LeanModel | SlicedDrafts, *args: Any, **kwargs: Any) -> None:
        """See `EagerExecutor`."""
        super().__init__(model, *args, **kwargs)
        heads = model.heads
        # One product over all offsets would read the rows that a draft vocabulary leaves out.
        self._whole = not isinstance(model, SlicedDrafts)
        self._at_once = heads.unembeddings is None and not heads.autoregressive and self._whole
        self.way = model.way
        cheap = has_tiles() and model.way == "kernel" and model.get_input_embeddings().weight.dtype == torch.bfloat16
        self._most_at_once = MOST_ROWS_AT_ONCE if cheap or model.way in ("packed", "plain") else MOST_PAID_ROWS_AT_ONCE
        self._ahead: tuple[OffsetHiddenStates, Tensor] | None = None

    def _run(self, ids: Tensor, mask: Any, position_ids: Tensor, num_offsets: int) -> OffsetHiddenStates:
        states = super()._run(ids, mask, position_ids, num_offsets)
        self._ahead = None
        count = 1 + len(states.future_hidden)
        if self._at_once and count > 1 and ids.numel() * count <= self._most_at_once:
            future_KBMD = torch.stack(states.future_hidden)
            if self._model.heads.uses_final_norm:
                future_KBMD = self._model.final_norm(future_KBMD)
            self._ahead = states, self._model.unembed(torch.cat((states.last_hidden_BTD[None], future_KBMD)))
        return states

    def _ragged_mask(self, slots_BM: Tensor) -> ChainMasks:
        return self._masks.chains(slots_BM)

    def logits(self, last_hidden_BMD: Tensor) -> Tensor:
        """See `EagerExecutor.logits`."""
        if self._ahead is not None and self._ahead[0].last_hidden_BTD is last_hidden_BMD:
            return self._ahead[1][0]
        return super().logits(last_hidden_BMD)

    def draft(self, states: OffsetHiddenStates, accepted: Nodes, *, last_B: Tensor | None = None, count: int) -> Tensor:
        """See `EagerExecutor.draft`."""
        markov: LeanMarkov | None = self._model.markov
        if self._at_one_call(states, accepted, count=count):
            drafted_BK: Tensor = self._model.likeliest(states.future_hidden[:count], accepted, last_B)
            return drafted_BK
        if markov is None or self._model.heads.reads_tokens:
            return super().draft(states, accepted, last_B=last_B, count=count)
        assert last_B is not None
        # Soft-capping keeps the order of logits.
        return markov.likeliest(self.draft_logits(states, accepted, count=count), last_B)

    def _at_one_call(self, states: OffsetHiddenStates, accepted: Nodes, *, count: int) -> bool:
        if self._model.likeliest is None or not self._whole or isinstance(accepted, Tensor):
            return False
        ahead = self._ahead is not None and self._ahead[0] is states
        return not ahead and count * len(accepted) <= MOST_ROWS

    def _markov_bias(self, tokens_BX: Tensor) -> Tensor:
        markov: LeanMarkov | None = self._model.markov
        return super()._markov_bias(tokens_BX) if markov is None else markov(tokens_BX)

    def draft_logits(self, states: OffsetHiddenStates, nodes: Nodes, *, count: int) -> Tensor:
        """See `EagerExecutor.draft_logits`."""
        if self._ahead is None or self._ahead[0] is not states:
            return super().draft_logits(states, nodes, count=count)
        future_KBMV = self._ahead[1][1 : 1 + count]
        if not isinstance(nodes, Tensor) and len(set(nodes)) == 1:
            return future_KBMV[:, :, nodes[0]]
        return future_KBMV[:, self._rows_B, torch.as_tensor(nodes, device=self.device)]
