"""Which slots each position of a block may look at.

Legend: B rows, M positions of one forward, S visible slots.

Masks are additive and in the model's dtype: that is what both the "sdpa" and the "eager" attention of transformers take
(a boolean mask is silently added as 0 and 1 in eager). They are built once per forward, not once per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headway.decoding.cache import RaggedCache
from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree
from headway.model.documents import masks_by_layer_type


def additive_mask(positions_BM: Tensor, slots_S: Tensor, *, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where the query at a position may look at a slot, the dtype's lowest number elsewhere.

    A position sees its own slot and those before it, at most `window` in all. No row is ever fully masked: every
    position sees itself.

    >>> additive_mask(torch.tensor([[2, 3]]), torch.arange(5), window=2, dtype=torch.float32) == 0
    tensor([[[[False,  True,  True, False, False],
              [False, False,  True,  True, False]]]])

    Args:
        positions_BM: positions of the queries.
        slots_S: slots that attention is given; slot equals position.
        window: tokens that a position sees, itself included; None for all.
        dtype: of the mask.

    Returns:
        [B, 1, M, S].
    """
    query_BM1 = positions_BM[:, :, None]
    hidden_BMS = slots_S > query_BM1
    if window is not None:
        hidden_BMS |= slots_S <= query_BM1 - window
    mask_BMS = torch.zeros(hidden_BMS.shape, dtype=dtype, device=hidden_BMS.device)
    return mask_BMS.masked_fill_(hidden_BMS, torch.finfo(dtype).min)[:, None]


class ChainMasks:
    """Masks of a block of chains whose rows stand anywhere, each made when somebody wants it.

    The lean kernel never does: it knows the slot of every position, which sees that slot and those before it.
    """

    def __init__(self, build: Callable[[int | None], Tensor]) -> None:
        """Hold what makes the mask of a window."""
        self._build = build
        self._made: dict[int | None, Tensor] = {}

    def of(self, window: int | None) -> Tensor:
        """[B, 1, M, S], made once."""
        if window not in self._made:
            self._made[window] = self._build(window)
        return self._made[window]


def tree_band(tree: Tree, distance: int, *, window: int | None, dtype: torch.dtype) -> Tensor:
    """What each node of a tree sees, additive, by the distance of a slot from the root's slot.

    A node sees the text before the root, its ancestors and itself, at most `window` positions in all, where a node's
    position is the root's plus its depth.

    >>> tree_band(Tree.from_choices([(0,), (1,), (1, 0)]), 2, window=2, dtype=torch.float32)[0, 0] == 0
    tensor([[False,  True,  True, False, False, False, False],
            [False, False,  True,  True, False, False, False],
            [False, False,  True, False,  True, False, False],
            [False, False, False, False,  True,  True, False]])

    Args:
        tree: R nodes.
        distance: how far before the root to look.
        window: positions that a node sees, itself included; None for all.
        dtype: of the mask.

    Returns:
        [1, 1, R, distance + R + 1]: distances -distance .. R - 1, and one more column that nobody sees.
    """
    depths_R = torch.tensor(tree.depths)
    before = torch.arange(-distance, 0)
    seen = torch.cat((torch.ones(len(tree), distance, dtype=torch.bool), tree.ancestors()), dim=1)
    if window is not None:
        seen &= torch.cat((before, depths_R)) > depths_R[:, None] - window
    seen = torch.cat((seen, torch.zeros(len(tree), 1, dtype=torch.bool)), dim=1)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


class BlockMasks:
    """Masks of decoding forwards: a slice of one prepared band where all rows stand at the same position.

    Row i of the band holds what the query at position p + i sees of slot p + r, for every distance r from -C to M - 1;
    it does not depend on p, so a mask is a view and costs nothing.
    """

    def __init__(
        self, config: Any, cache: RaggedCache, *, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Prepare the bands.

        Args:
            config: the base's configuration; tells whether its forward takes one mask or one per layer type.
            cache: tells which slots are visible.
            width: largest M.
            dtype: the model's.
            device: the model's.
        """
        self._config = config
        self._cache = cache
        self._dtype = dtype
        self._tree_bands: dict[tuple[int, ...], dict[int | None, Tensor]] = {}
        self._slots_C = torch.arange(cache.capacity, device=device)
        self._width = width
        # A single query sees every slot that its layer's view shows, so "sdpa" can do without a mask, its fastest case.
        # A family that takes one mask for all layers would then build its own, which is none without a window only.
        self._layer_types = set(getattr(config, "layer_types", None) or ())
        self._single_query_unmasked = getattr(config, "_attn_implementation", None) == "sdpa" and (
            bool(self._layer_types) or set(cache.views) == {None}
        )

    @cached_property
    def _bands(self) -> dict[int | None, Tensor]:
        """Made when rows first stand at the same position; in a batch whose rows come and go that may be never."""
        device, capacity = self._slots_C.device, len(self._slots_C)
        queries_1M = torch.arange(self._width, device=device)[None] + capacity
        band_slots = torch.arange(capacity + self._width, device=device)
        return {
            window: additive_mask(queries_1M, band_slots, window=window, dtype=self._dtype)
            for window in self._cache.views
        }

    def aligned(self) -> Tensor | dict[str, Tensor] | dict[str, None] | None:
        """Masks [1, 1, M, S] for a forward of which every row starts at the cache's position."""
        cache = self._cache
        if cache.width == 1 and self._single_query_unmasked:
            return dict.fromkeys(self._layer_types) if self._layer_types else None

        def build(window: int | None) -> Tensor:
            view = cache.views[window]
            start = view.start - cache.position + cache.capacity
            return self._bands[window].narrow(2, 0, cache.width).narrow(3, start, view.length)

        return masks_by_layer_type(self._config, build)

    def ragged(self, positions_BM: Tensor) -> Tensor | dict[str, Tensor]:
        """Masks [B, 1, M, S] for a forward whose rows stand at different positions."""
        return masks_by_layer_type(self._config, self.chains(positions_BM).of)

    def chains(self, positions_BM: Tensor) -> ChainMasks:
        """The same masks, made when they are wanted; until the next forward begins."""

        def build(window: int | None) -> Tensor:
            view = self._cache.views[window]
            slots_S = self._slots_C.narrow(0, view.start, view.length)
            return additive_mask(positions_BM, slots_S, window=window, dtype=self._dtype)

        return ChainMasks(build)

    def aligned_tree(self, tree: Tree) -> Tensor | dict[str, Tensor]:
        """Masks [1, 1, R, S] for a tree of which every row starts at the cache's position."""
        cache, bands = self._cache, self._bands_of(tree)

        def build(window: int | None) -> Tensor:
            view = cache.views[window]
            return bands[window].narrow(3, view.start - cache.position + cache.capacity, view.length)

        return masks_by_layer_type(self._config, build)

    def row_trees(self, trees: RowTrees, roots_B1: Tensor) -> Tensor | dict[str, Tensor]:
        """Masks [B, 1, R, S] for rows with trees of their own, whose roots stand anywhere."""
        ancestors_BRR = trees.ancestors(roots_B1.device)
        depths_BR = ancestors_BRR.sum(dim=2) - 1

        def build(window: int | None) -> Tensor:
            view = self._cache.views[window]
            distance_BS = self._slots_C.narrow(0, view.start, view.length) - roots_B1
            node_BS = distance_BS.clamp(min=0, max=len(trees) - 1)
            node_BRS = node_BS[:, None].expand(-1, len(trees), -1)
            in_tree_BRS = ancestors_BRR.gather(2, node_BRS) & (distance_BS == node_BS)[:, None]
            seen_BRS = in_tree_BRS | (distance_BS < 0)[:, None]
            if window is not None:
                at_BS = torch.where(distance_BS < 0, distance_BS, depths_BR.gather(1, node_BS))
                seen_BRS &= at_BS[:, None] > depths_BR[:, :, None] - window
            mask_BRS = torch.zeros(seen_BRS.shape, dtype=self._dtype, device=seen_BRS.device)
            return mask_BRS.masked_fill_(~seen_BRS, torch.finfo(self._dtype).min)[:, None]

        return masks_by_layer_type(self._config, build)

    def ragged_tree(self, tree: Tree, roots_B1: Tensor) -> Tensor | dict[str, Tensor]:
        """Masks [B, 1, R, S] for a tree whose roots stand at different positions."""
        bands = self._bands_of(tree)

        def build(window: int | None) -> Tensor:
            view, band = self._cache.views[window], bands[window]
            distance_BS = self._slots_C.narrow(0, view.start, view.length) - roots_B1 + self._cache.capacity
            mask_RBS = band[0, 0][:, distance_BS.clamp(max=band.shape[3] - 1)]
            return mask_RBS.transpose(0, 1)[:, None].contiguous()

        return masks_by_layer_type(self._config, build)

    def _bands_of(self, tree: Tree) -> dict[int | None, Tensor]:
        bands = self._tree_bands.get(tree.parents)
        if bands is None:
            capacity, device = self._cache.capacity, self._slots_C.device
            bands = self._tree_bands[tree.parents] = {
                window: tree_band(tree, capacity, window=window, dtype=self._dtype).to(device)
                for window in self._cache.views
            }
        return bands
