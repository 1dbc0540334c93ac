"""Where drafts that branch stand in the cache, for heads that keep keys and values of drafted tokens.

Legend: B rows, W known positions of a forward, N drafted tokens of a call, X = known ones + N, S visible slots.

A call of such a head writes the entries of known positions at their own slots and those of the N nodes behind them, where the
head's layer holds nothing that counts: at depth k the last k - 1 known positions have no entry before the draft is decided.
The next forward repeats those positions (`Heads.lookback`) and overwrites what the nodes left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headway.decoding.cache import RaggedCache
from headway.functional.row_trees import DynamicTree, RowTrees
from headway.functional.tree import Tree
from headway.heads.base import DraftPlaces, Heads, LayerCall


@dataclass(frozen=True)
class ForwardColumns:
    """What stood in the columns of a forward.

    Attributes:
        starts: per row the slot of its first column.
        roots: per row the column of its last token that was known before.
        tree: of the columns from there on; None for a chain.
    """

    starts: Sequence[int]
    roots: Sequence[int]
    tree: Tree | RowTrees | None = None

    def known(self, nodes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Columns that stand after a node was accepted in every row.

        Args:
            nodes: per row the last accepted one, counted from its root.
            device: of the answer.

        Returns:
            [B, W] columns in the order of their positions, with fillers after a row's last; [B] which is its last.
        """
        if self.tree is None:
            last = [root + node for root, node in zip(self.roots, nodes, strict=True)]
            columns_W = torch.arange(max(last) + 1, device=device)
            return columns_W.expand(len(last), -1), torch.tensor(last, device=device)
        paths = [self.tree.of_row(row).path(node) for row, node in enumerate(nodes)]
        columns = [
            [*range(root + 1), *(root + node for node in path)] for root, path in zip(self.roots, paths, strict=True)
        ]
        longest = max(map(len, columns))
        filled = [own + [0] * (longest - len(own)) for own in columns]
        return torch.tensor(filled, device=device), torch.tensor([len(own) - 1 for own in columns], device=device)


@dataclass(frozen=True)
class CachePlaces(DraftPlaces):
    """Known positions at their own slots, drafted tokens behind them, in the cache of a batch.

    Attributes:
        cache: of base and heads.
        window: positions that the heads' layers see, a position itself included; None for all.
        dtype: of masks.
        starts: per row the slot of its first known position in `columns_BW`.
    """

    cache: RaggedCache
    window: int | None
    dtype: torch.dtype
    starts: Sequence[int]

    def call(
        self,
        call: LayerCall,
        layer: nn.Module,
        *,
        depth: int,
        known: int,
        levels: Sequence[int],
        ancestors_BNN: Tensor,
    ) -> LayerCall:
        """See `headway.heads.base.DraftPlaces.call`."""
        device, width = self.last_B.device, known + len(levels)
        start_B1 = torch.tensor(self.starts, device=device)[:, None]
        low, high = min(self.starts), max(self.starts)
        if low == high:
            self.cache.begin_aligned(low, width)
        else:
            slots_BX = start_B1 + torch.arange(width, device=device)
            self.cache.begin_ragged(slots_BX, first=low, end=high + width)
        # Both below 0 where a row is too short for such an entry; what is computed there is read by nobody.
        root_B1 = self.last_B[:, None] + 1 - depth
        place_BN = root_B1 + torch.tensor(levels, dtype=torch.long, device=device)
        columns_BX = torch.cat((self.columns_BW[:, :known], self.columns_BW.gather(1, place_BN.clamp(min=0))), dim=1)
        seen_BXS = torch.cat(
            (self._of_known(start_B1, known), self._of_nodes(start_B1, root_B1, place_BN, ancestors_BNN, known)), dim=1
        )
        mask_BXS = torch.zeros(seen_BXS.shape, dtype=self.dtype, device=device)
        mask_BXS.masked_fill_(~seen_BXS, torch.finfo(self.dtype).min)
        return call.moved(layer, columns_BX, mask_BXS[:, None])

    def _slots(self) -> Tensor:
        view = self.cache.views[self.window]
        return torch.arange(view.start, view.start + view.length, device=self.last_B.device)

    def _of_known(self, start_B1: Tensor, known: int) -> Tensor:
        """What known positions see: all up to themselves."""
        slots_S = self._slots()
        own_BX1 = (start_B1 + torch.arange(known, device=slots_S.device))[..., None]
        seen_BXS = slots_S <= own_BX1
        if self.window is not None:
            seen_BXS &= slots_S > own_BX1 - self.window
        return seen_BXS

    def _of_nodes(
        self, start_B1: Tensor, root_B1: Tensor, place_BN: Tensor, ancestors_BNN: Tensor, known: int
    ) -> Tensor:
        """What nodes see: known tokens up to the root, and their paths."""
        slots_S, nodes = self._slots(), place_BN.shape[1]
        position_BN1 = (start_B1 + place_BN)[..., None]
        seen_BNS = (slots_S <= start_B1 + root_B1)[:, None].expand(-1, nodes, -1)
        if not nodes:
            return seen_BNS
        number_BS = slots_S - start_B1 - known
        node_BS = number_BS.clamp(min=0, max=nodes - 1)
        path_BNS = ancestors_BNN.gather(2, node_BS[:, None].expand(-1, nodes, -1))
        # Where an entry would stand before the text begins there is none, but a node always sees itself.
        own_NN = torch.eye(nodes, dtype=torch.bool, device=slots_S.device)
        path_BNS &= (place_BN >= 0).gather(1, node_BS)[:, None] | own_NN[:, node_BS].transpose(0, 1)
        path_BNS &= (number_BS == node_BS)[:, None]
        if self.window is not None:
            nearest_BN1 = position_BN1 - self.window
            seen_BNS = seen_BNS & (slots_S > nearest_BN1)
            path_BNS &= (start_B1 + place_BN).gather(1, node_BS)[:, None] > nearest_BN1
        return seen_BNS | path_BNS


def branches(tree: Tree | DynamicTree | None) -> bool:
    """Whether blocks of a draft can be anything but a chain."""
    return tree is not None and not tree.is_chain


def most_open_nodes(tree: Tree | DynamicTree) -> int:
    """Drafted tokens that a draft expands, in all its levels: the most entries that it writes behind known positions."""
    if isinstance(tree, DynamicTree):
        return tree.width * max(0, tree.depth - 1)
    return sum(len(level.parents) for level in tree.levels[1:])


def keeps_drafts(heads: Heads, num_draft_tokens: int) -> bool:
    """Whether so many drafted tokens leave keys and values in the caches of the heads."""
    return heads.reads_tokens and heads.cache_layers(num_draft_tokens) > 0


def block_slots(heads: Heads, num_draft_tokens: int, tree: Tree | DynamicTree | None) -> int:
    """Slots from a row's last known token on that a block takes, and the draft that is made after it.

    Args:
        heads: of the model.
        num_draft_tokens: K of the heads.
        tree: the largest block; None for a chain of the heads' drafts.
    """
    if tree is None:
        return num_draft_tokens + 1
    if not (keeps_drafts(heads, num_draft_tokens) and branches(tree)):
        return len(tree)
    return max(len(tree), 1 + tree.depth + most_open_nodes(tree))
