"""Turning the logits of a block into the tokens that each row emits: the greedy fast path.

Legend: B rows, M positions of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree


@dataclass(frozen=True, slots=True)
class Emission:
    """What one row gets from one forward.

    Attributes:
        tokens: the tokens it emits, at least one.
        accepted: drafts of the block that stand, of those that were compared with an emitted token.
        finished: whether the row ends with the last of these tokens.
        nodes: the accepted nodes of the block's tree; None where they are its first ones.
        drafted: how many drafts, one per depth, were compared with an emitted token; None for a whole chain.
    """

    tokens: list[int]
    accepted: int
    finished: bool
    nodes: tuple[int, ...] | None = field(default=None, compare=False)
    drafted: int | None = field(default=None, compare=False)

    @property
    def last_node(self) -> int:
        """The last accepted node of a row that goes on, 0 for the root."""
        if self.nodes is None:
            return len(self.tokens) - 1
        return self.nodes[-1] if self.nodes else 0

    def ending_after(self, count: int) -> Emission:
        """The first `count` tokens of it, after which the row ends."""
        return replace(
            self,
            tokens=self.tokens[:count],
            accepted=min(self.accepted, count),
            finished=True,
            drafted=None if self.drafted is None else min(self.drafted, count),
        )


class Chooser(Protocol):
    """Decides what the rows of a batch emit."""

    def choose(
        self,
        logits_BMV: Tensor,
        block_BM: Tensor,
        rooms: Sequence[int],
        *,
        tree: Tree | RowTrees | None = None,
        draft_probs: Sequence[Mapping[int, Tensor]] | None = None,
        absent: Sequence[frozenset[int]] | None = None,
    ) -> list[Emission | None]:
        """Emit, for every row that is not finished, its next tokens.

        Args:
            logits_BMV: offset-1 logits; position j is valid for a row only if its drafts before j stand.
            block_BM: the last known token of each row and its draft (M - 1 tokens).
            rooms: tokens each row may still get; 0 for a finished row, which gets None.
            tree: of the block's positions; None for a chain.
            draft_probs: per row, where drafts were drawn: node -> the distribution that its children were drawn from.
            absent: per row the nodes that hold no draft but a filler; None where there is none.
        """


def right_drafts(drafts: Sequence[int], target: Sequence[int]) -> int:
    """How many drafts of a chain stand: `headway.functional.acceptance.accept_greedy_chain` of one row, on lists.

    >>> right_drafts([5, 9, 7], [5, 6, 7, 8])
    1

    Six operations on tensors take longer than the comparison.
    """
    return next((at for at, token in enumerate(drafts) if token != target[at]), len(drafts))


class GreedyChooser:
    """Arg max at every position, end-of-sequence ids and a length limit; one wait for the device per block."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def choose(
        self,
        logits_BMV: Tensor,
        block_BM: Tensor,
        rooms: Sequence[int],
        *,
        tree: Tree | RowTrees | None = None,
        draft_probs: Sequence[Mapping[int, Tensor]] | None = None,
        absent: Sequence[frozenset[int]] | None = None,
    ) -> list[Emission | None]:
        """See `Chooser.choose`; a filler that is right by chance is as good as a draft."""
        assert draft_probs is None
        target_BM = self._targets(logits_BMV, rooms, tree)
        if block_BM.shape[1] == 1:
            return [
                self._emit(target, 0, room) if room else None
                for target, room in zip(target_BM.tolist(), rooms, strict=True)
            ]
        if tree is not None and not tree.is_chain:
            return self._choose_in_tree(target_BM.tolist(), block_BM.tolist(), rooms, tree)
        width = block_BM.shape[1]
        both: list[list[int]] = torch.cat((target_BM, block_BM[:, 1:]), dim=1).tolist()
        emissions: list[Emission | None] = []
        for row, room in zip(both, rooms, strict=True):
            target, drafts = row[:width], row[width:]
            emissions.append(self._emit(target, right_drafts(drafts, target), room) if room else None)
        return emissions

    def _targets(self, logits_BMV: Tensor, rooms: Sequence[int], tree: Tree | RowTrees | None) -> Tensor:
        """The model's own token after every position, int64 [B, M]."""
        # transformers decides on float32 scores, so a float64 model must too where the two differ.
        return (logits_BMV.float() if logits_BMV.dtype == torch.float64 else logits_BMV).argmax(dim=-1)

    def _choose_in_tree(
        self, targets: list[list[int]], blocks: list[list[int]], rooms: Sequence[int], tree: Tree | RowTrees
    ) -> list[Emission | None]:
        """The longest path of the model's own choices; several nodes of one depth may hold the same token."""
        emissions: list[Emission | None] = []
        for row, (target, block, room) in enumerate(zip(targets, blocks, rooms, strict=True)):
            if not room:
                emissions.append(None)
                continue
            shape, found, own = tree.of_row(row), [0], [target[0]]
            while True:
                below = [child for node in found for child in shape.children[node] if block[child] == own[-1]]
                if not below:
                    break
                found = below
                own.append(target[found[0]])
            nodes = shape.path(found[0])
            emission = self._emit(own, len(nodes), room)
            compared = len(nodes) + bool(shape.children[found[0]])
            emissions.append(replace(emission, nodes=nodes, drafted=min(compared, len(emission.tokens))))
        return emissions

    def _emit(self, target: list[int], accepted: int, room: int) -> Emission:
        tokens = target[: min(accepted + 1, room)]
        finished = len(tokens) == room
        if not self._eos_token_ids.isdisjoint(tokens):
            end = next(index for index, token in enumerate(tokens) if token in self._eos_token_ids)
            tokens, finished = tokens[: end + 1], True
        return Emission(tokens, min(accepted, len(tokens)), finished)
