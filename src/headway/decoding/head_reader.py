"""Reading the heads after a forward: logits, and drafts at once, offset by offset or along paths.

Legend: B rows, M positions of a block, D width, V vocabulary, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headway.decoding.cache import RaggedCache
from headway.decoding.draft_places import CachePlaces, ForwardColumns
from headway.decoding.levels import FIRST_OFFSET, Levels, SharedLevels, SteppedLevels
from headway.heads.base import DraftPoint
from headway.model.output import OffsetHiddenStates

Pick = Callable[[Tensor, int], Tensor]
"""(logits [B, V], offset) -> the drafted token of each row [B]."""

Nodes = Sequence[int] | Tensor
"""A column of the last forward for each row; a tensor [B] where the host does not know it."""


class HeadReader:
    """The part of an executor that turns hidden states into logits and drafts; whoever runs forwards tells it what stood in them.

    Attributes:
        cache: keys and values of base and heads.
        device: of the model.
    """

    cache: RaggedCache
    device: torch.device
    _model: Any
    _rows_B: Tensor
    _known: DraftPoint | None
    """The last forward, for heads that draft in turn."""
    _columns: ForwardColumns
    """What stood in its columns, for drafts that branch."""
    _by_path: bool
    """Whether drafts may branch though heads keep keys and values of drafted tokens."""
    _head_window: int | None
    """Positions that the heads' layers see; None for all."""

    @property
    def drafts_in_turn(self) -> bool:
        """Whether what a head says depends on the tokens drafted before it (`Heads.autoregressive`)."""
        return bool(self._model.heads.autoregressive)

    def logits(self, last_hidden_BMD: Tensor) -> Tensor:
        """Offset-1 logits [B, M, V] of hidden states that the decoder has already normed."""
        logits: Tensor = self._model.unembed(last_hidden_BMD)
        return logits

    def draft(self, states: OffsetHiddenStates, accepted: Nodes, *, last_B: Tensor | None = None, count: int) -> Tensor:
        """The heads' most likely tokens after the last accepted position of each row.

        Args:
            states: of the last forward.
            accepted: per row, how many of that forward's drafts stand: the heads are read there.
            last_B: the token that the model has chosen after them, for heads that draft in turn.
            count: K wanted.

        Returns:
            int64 [B, K]; item i is offset i + 2.
        """
        if self._model.heads.autoregressive:
            assert last_B is not None
            return self._draft_in_turn(states, accepted, last_B, self._pick, count=count)
        draft_KB: Tensor = self.draft_logits(states, accepted, count=count).argmax(dim=-1)
        return draft_KB.T

    def draft_logits(self, states: OffsetHiddenStates, nodes: Nodes, *, count: int) -> Tensor:
        """What heads say at one node of each row whatever was drafted before; not for heads that read drafted tokens.

        Args:
            states: of the last forward.
            nodes: per row the column of that forward.
            count: K wanted.

        Returns:
            [K, B, V]; item i is offset i + 2. Of heads with a Markov bias without it, and without soft-capping.
        """
        future = states.future_hidden[:count]
        if not isinstance(nodes, Tensor) and len(set(nodes)) == 1:
            hidden_KBD = torch.stack([head_BMD[:, nodes[0]] for head_BMD in future])
        else:
            at_B = torch.as_tensor(nodes, device=self.device)
            hidden_KBD = torch.stack([head_BMD[self._rows_B, at_B] for head_BMD in future])
        logits = self._logits_before_bias if self._model.heads.markov is not None else self._model.offset_logits
        if self._model.heads.unembeddings is not None:
            per_offset = enumerate(hidden_KBD, start=2)
            return torch.stack([logits(h_BD, offset=offset) for offset, h_BD in per_offset])
        logits_KBV: Tensor = logits(hidden_KBD, offset=2)
        return logits_KBV

    def begin_levels(self, states: OffsetHiddenStates, nodes: Nodes, *, count: int) -> Levels:
        """Start a draft whose next tokens may depend on those before: the heads' logits, one depth after the other.

        Args:
            states: of the last forward.
            nodes: per row the last accepted column of that forward.
            count: K wanted.
        """
        heads = self._model.heads
        if not heads.reads_tokens:
            logits_KBV = self.draft_logits(states, nodes, count=count)
            if heads.markov is None:
                return SharedLevels(logits_KBV)
            return SharedLevels(logits_KBV, bias=self._markov_bias, soft_cap=self._soft_cap)
        assert self._known is not None
        if self._by_path:
            assert not isinstance(nodes, Tensor)
            point = replace(self._known, places=self._places(nodes))
        else:
            point = replace(self._known, columns_B=self._known.columns_B + torch.as_tensor(nodes, device=self.device))
        return SteppedLevels(heads.begin_draft(point), self._stepped_logits)

    def _places(self, nodes: Sequence[int]) -> CachePlaces:
        """Where a draft that may branch stands after the last forward."""
        columns_BW, last_B = self._columns.known(nodes, self.device)
        dtype = self._model.get_input_embeddings().weight.dtype
        return CachePlaces(columns_BW, last_B, self.cache, self._head_window, dtype, self._columns.starts)

    def draft_picked(
        self, states: OffsetHiddenStates, accepted: Nodes, *, last_B: Tensor, count: int, pick: Pick
    ) -> Tensor:
        """As `draft`, with tokens that the caller picks from each offset's logits, offset after offset."""
        return self._draft_in_turn(states, accepted, last_B, pick, count=count)

    def _draft_in_turn(
        self, states: OffsetHiddenStates, accepted: Nodes, last_B: Tensor, pick: Pick, *, count: int
    ) -> Tensor:
        """Offset by offset, each told the token before it."""
        levels = self.begin_levels(states, accepted, count=count)
        drafts, previous_B = [], last_B
        for offset in range(FIRST_OFFSET, FIRST_OFFSET + count):
            previous_B = pick(levels(previous_B[:, None], None)[:, 0], offset)
            drafts.append(previous_B)
        return torch.stack(drafts, dim=1)

    def _logits_before_bias(self, hidden: Tensor, *, offset: int) -> Tensor:
        logits: Tensor = self._model.unembedding(offset)(self._model.before_unembedding(hidden, offset=offset))
        return logits

    def _markov_bias(self, tokens_BX: Tensor) -> Tensor:
        bias_BXV: Tensor = self._model.heads.markov(tokens_BX)
        return bias_BXV

    def _soft_cap(self, logits: Tensor) -> Tensor:
        capped: Tensor = self._model.family.soft_cap(logits)
        return capped

    def _stepped_logits(self, hidden_BXD: Tensor, offset: int, tokens_BX: Tensor) -> Tensor:
        previous = None if self._model.heads.markov is None else tokens_BX
        logits_BXV: Tensor = self._model.offset_logits(hidden_BXD, offset=offset, previous=previous)
        return logits_BXV

    def _pick(self, logits_BV: Tensor, offset: int) -> Tensor:
        """The draft of one offset."""
        return logits_BV.argmax(dim=-1)

    def _remember(self, states: OffsetHiddenStates, tokens_BW: Tensor, columns_B: Tensor) -> None:
        """Keep the last pass and each row's last token that was known before it, for heads that draft in turn."""
        if states.head_inputs is not None:
            self._known = DraftPoint(states.head_inputs, states.future_hidden, tokens_BW, columns_B)
