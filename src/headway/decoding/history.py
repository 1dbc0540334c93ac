"""The ids of a batch as transformers' processors and criteria want to see them.

Legend: B rows, V vocabulary, L columns (prompt as given + room for new tokens).

transformers' processors and criteria are written for a loop that adds one token to every row at a time: they want a
rectangle of ids. Rows that accept different numbers of drafts do not form one, so they are served by length: one call for
all rows that have the same number of tokens, which sees their true prefix. Other rows are in the rectangle too, so that
row indices keep their meaning, and what the call says about them is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class PrefixGate:
    """A `prefix_allowed_tokens_fn` that is asked about live rows only.

    In a ragged batch the rectangle holds rows that are shorter than the call's length; a constraint automaton need not
    know what to say about those.
    """

    def __init__(self, allowed: Callable[[int, Tensor], list[int]]) -> None:
        self._allowed = allowed
        self.live: frozenset[int] | None = None

    def __call__(self, batch_id: int, ids_T: Tensor) -> list[int]:
        """The tokens allowed next in a live row; any token in another."""
        if self.live is not None and batch_id not in self.live:
            return [0]
        return self._allowed(batch_id, ids_T)


class History:
    """The rectangle of ids, and the processors and criteria that read it.

    Equal to transformers' own loop: the processors see the ids up to a position, padding at the front, and float32
    scores; the criteria see the ids with the new token. Processors must depend on nothing but their arguments, since
    positions are served once per length and not in one call per token of the whole batch.
    """

    def __init__(
        self,
        history_BT: Tensor,
        *,
        max_new_tokens: int,
        pad_token_id: int,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Any], Tensor],
        gate: PrefixGate | None,
    ) -> None:
        """Hold the prompts.

        Args:
            history_BT: prompts as transformers sees them, padding at the front.
            max_new_tokens: the most tokens a row can get.
            pad_token_id: what fills a row after its end.
            logits_processor: transformers' list.
            stopping_criteria: transformers' list.
            gate: the wrapped `prefix_allowed_tokens_fn`, where there is one.
        """
        self.batch, self._columns = history_BT.shape
        self.max_new_tokens = max_new_tokens
        self._ids_BL = history_BT.new_full((self.batch, self._columns + max_new_tokens), pad_token_id)
        self._ids_BL[:, : self._columns] = history_BT
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._gate = gate

    def put(self, row: int, made: int, tokens: Sequence[int]) -> None:
        """Write tokens of a row after its first `made` new ones; drafts are written over until they stand."""
        if tokens:
            begin = self._columns + made
            self._ids_BL[row, begin : begin + len(tokens)] = torch.tensor(tokens, device=self._ids_BL.device)

    def scores(self, logits_BV: Tensor, made: int, live: Sequence[int]) -> Tensor:
        """Processed float32 scores [B, V] for the token after `made` new ones; of the rows in `live` only.

        Args:
            logits_BV: of the positions in question; must not be anybody else's, processors may write into it.
            made: new tokens before the one in question, which have been put.
            live: rows that the call is about.
        """
        if self._gate is not None:
            self._gate.live = frozenset(live)
        scores_BV = logits_BV.to(device=self._ids_BL.device, dtype=torch.float32)
        return self._processor(self._ids_BL[:, : self._columns + made], scores_BV)

    def ended(self, made: int) -> list[bool]:
        """Per row whether the criteria end it after `made` new tokens."""
        stops: list[bool] = self._criteria(self._ids_BL[:, : self._columns + made], None).tolist()
        return stops
