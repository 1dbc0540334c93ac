"""Turning the logits of a block into tokens under logits processors, stopping criteria and sampling.

Legend: B rows, M positions of a block, V vocabulary, L columns of the history (prompt as given + room for new tokens).

transformers' processors and criteria are written for a loop that adds one token to every row at a time: they want a
rectangle of ids. Rows that accept different numbers of drafts do not form one, so a block is swept by length: all rows
that have the same number of new tokens are served by one call, which sees their true prefix. Other rows are in the
rectangle too, so that row indices keep their meaning, and what the call says about them is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.decoding.choosing import Emission


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


class ScoredChooser:
    """Processors and criteria in order at every position of a block, on the prefix that is valid there.

    Equal to transformers' own loop: the processors see the ids up to the position, padding at the front, and float32
    scores; the criteria see the ids with the new token. Processors must depend on nothing but their arguments, since a
    block's positions are served once per length and not in one call per token of the whole batch; without drafts they
    are called exactly as transformers calls them.
    """

    def __init__(
        self,
        history_BT: Tensor,
        *,
        max_new_tokens: int,
        pad_token_id: int,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Any], Tensor],
        do_sample: bool,
        gate: PrefixGate | None,
    ) -> None:
        """Hold the growing rectangle of ids.

        Args:
            history_BT: prompts as transformers sees them, padding at the front.
            max_new_tokens: the most tokens a row can get.
            pad_token_id: what fills a row after its end.
            logits_processor: transformers' list.
            stopping_criteria: transformers' list.
            do_sample: draw from the processed distribution instead of taking its arg max; blocks must have M = 1.
            gate: the wrapped `prefix_allowed_tokens_fn`, where there is one.
        """
        batch, self._columns = history_BT.shape
        self._ids_BL = history_BT.new_full((batch, self._columns + max_new_tokens), pad_token_id)
        self._ids_BL[:, : self._columns] = history_BT
        self._max_new_tokens = max_new_tokens
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._do_sample = do_sample
        self._gate = gate
        self._rows_B = torch.arange(batch, device=history_BT.device)

    def choose(self, logits_BMV: Tensor, block_BM: Tensor, rooms: Sequence[int]) -> list[Emission | None]:
        """See `Chooser.choose`."""
        drafts: list[list[int]] = block_BM[:, 1:].tolist()
        tokens: list[list[int]] = [[] for _ in rooms]
        finished = [room == 0 for room in rooms]
        accepted = [0] * len(rooms)
        live = {row for row, room in enumerate(rooms) if room}
        while live:
            made = {row: self._max_new_tokens - rooms[row] + len(tokens[row]) for row in live}
            shortest = min(made.values())
            group = [row for row in live if made[row] == shortest]
            at = [min(len(row), block_BM.shape[1] - 1) for row in tokens]
            chosen, stops = self._decide(logits_BMV, at, group, shortest)
            for row in group:
                place = len(tokens[row])
                tokens[row].append(chosen[row])
                agrees = place < len(drafts[row]) and drafts[row][place] == chosen[row]
                accepted[row] += agrees
                finished[row] = stops[row] or len(tokens[row]) == rooms[row]
                if finished[row] or not agrees:
                    live.remove(row)
        return [
            Emission(row, right, done) if row else None
            for row, right, done in zip(tokens, accepted, finished, strict=True)
        ]

    def _decide(self, logits_BMV: Tensor, at: list[int], group: list[int], made: int) -> tuple[list[int], list[bool]]:
        """The next token of every row of `group`, which all have `made` new tokens, and whether it ends the row."""
        end = self._columns + made
        device = self._ids_BL.device
        at_B = torch.tensor(at, device=logits_BMV.device)
        # Processors may write into the scores; indexing copies.
        scores_BV = logits_BMV[self._rows_B.to(logits_BMV.device), at_B].to(device=device, dtype=torch.float32)
        if self._gate is not None:
            self._gate.live = frozenset(group)
        scores_BV = self._processor(self._ids_BL[:, :end], scores_BV)
        if self._do_sample:
            next_B = torch.multinomial(scores_BV.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            next_B = scores_BV.argmax(dim=-1)
        group_G = torch.tensor(group, device=device)
        self._ids_BL[group_G, end] = next_B[group_G]
        stop_B = self._criteria(self._ids_BL[:, : end + 1], None)
        return next_B.tolist(), stop_B.tolist()
