"""Turning the logits of a block into the tokens that each row emits: the greedy fast path.

Legend: B rows, M positions of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headway.functional.acceptance import accept_greedy_chain


@dataclass(frozen=True, slots=True)
class Emission:
    """What one row gets from one forward.

    Attributes:
        tokens: the tokens it emits, at least one.
        accepted: drafts of the block that stand, of those that were compared with an emitted token.
        finished: whether the row ends with the last of these tokens.
    """

    tokens: list[int]
    accepted: int
    finished: bool


class Chooser(Protocol):
    """Decides what the rows of a batch emit."""

    def choose(self, logits_BMV: Tensor, block_BM: Tensor, rooms: Sequence[int]) -> list[Emission | None]:
        """Emit, for every row that is not finished, its next tokens.

        Args:
            logits_BMV: offset-1 logits; position j is valid for a row only if its drafts before j stand.
            block_BM: the last known token of each row and its draft (M - 1 tokens).
            rooms: tokens each row may still get; 0 for a finished row, which gets None.
        """


class GreedyChooser:
    """Arg max at every position, end-of-sequence ids and a length limit; one wait for the device per block."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def choose(self, logits_BMV: Tensor, block_BM: Tensor, rooms: Sequence[int]) -> list[Emission | None]:
        """See `Chooser.choose`."""
        # transformers decides on float32 scores, so a float64 model must too where the two differ.
        target_BM = (logits_BMV.float() if logits_BMV.dtype == torch.float64 else logits_BMV).argmax(dim=-1)
        if block_BM.shape[1] == 1:
            return [
                self._emit(target, 0, room) if room else None
                for target, room in zip(target_BM.tolist(), rooms, strict=True)
            ]
        accepted_B = accept_greedy_chain(block_BM[:, 1:], target_BM)
        verdicts: list[list[int]] = torch.cat((target_BM, accepted_B[:, None]), dim=1).tolist()
        return [
            self._emit(verdict, verdict[-1], room) if room else None
            for verdict, room in zip(verdicts, rooms, strict=True)
        ]

    def _emit(self, target: list[int], accepted: int, room: int) -> Emission:
        tokens = target[: min(accepted + 1, room)]
        finished = len(tokens) == room
        if not self._eos_token_ids.isdisjoint(tokens):
            end = next(index for index, token in enumerate(tokens) if token in self._eos_token_ids)
            tokens, finished = tokens[: end + 1], True
        return Emission(tokens, min(accepted, len(tokens)), finished)
