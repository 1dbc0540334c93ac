"""A key/value cache whose rows advance by different amounts.

Legend: B rows, H key/value heads, M positions of one forward, C capacity in slots, D head width.

Prompts carry no padding in front: the token at position p of a row lives in slot p. Slots beyond a row's position
hold leftovers of rejected drafts; the mask hides them and the next forward overwrites them before any query can reach
them, so taking tokens back is only a matter of where the next forward starts. The nodes of a candidate tree lie in the
slots from its root's on, in their order; the accepted path is then moved to where it belongs. Head layers are further
layers of the same cache, at indices L, L+1, ...

Memory follows the text: slots are allocated as they are needed, twice as many each time, up to the capacity, so every
slot is copied less than twice on average and a text that ends early never takes what it could have taken.

Rows come and go (`absorb`, `select`): the batch is the first of the rows that there is room for, so a row that leaves is
replaced by the last one, and a newcomer takes the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from headway.errors import DecodingError


@dataclass
class SlotView:
    """The slots that layers of one kind hand to attention in the current forward.

    Attributes:
        window: tokens that a position sees, itself included; None for all.
        start: first visible slot.
        length: number of visible slots.
    """

    window: int | None
    start: int = 0
    length: int = 0

    def cover(self, first_position: int, end_slot: int) -> None:
        """Show what queries from `first_position` on can see, up to `end_slot` (excluded)."""
        self.start = 0 if self.window is None else max(0, first_position - self.window + 1)
        self.length = end_slot - self.start


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [B, H, allocated slots, D], made when the family first shows their shape and dtype."""

    is_compileable = False
    is_croppable = False

    def __init__(self, owner: RaggedCache, view: SlotView) -> None:
        super().__init__()
        self.owner = owner
        self.view = view
        self.is_sliding = view.window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: leftovers must be finite, since a masked slot still enters a product with weight 0."""
        self.allocate(key_states[:, :, :0], value_states[:, :, :0])

    def allocate(self, keys_BHSD: Tensor, values_BHSD: Tensor) -> None:
        """Take as many rows and slots as the cache now allocates, of which the first hold what is given."""
        rows, slots = self.owner.allocated_rows, self.owner.allocated
        self._storage = _with_room(keys_BHSD, rows, slots), _with_room(values_BHSD, rows, slots)
        self.is_initialized = True
        self.show_rows()

    def show_rows(self) -> None:
        """Let keys and values be those of the cache's rows; further rows wait to be taken."""
        self.keys, self.values = (whole.narrow(0, 0, self.owner.batch) for whole in self._storage)

    def grow(self) -> None:
        """Take as many rows and slots as the cache now allocates; what they hold stays."""
        self.allocate(self.keys, self.values)

    def absorb(self, other: RaggedLayer, *, before: int, end: int, moves: bool) -> None:
        """Append the rows of another layer; see `RaggedCache.absorb`."""
        if not (self.is_initialized or other.is_initialized):
            return
        if not self.is_initialized:
            # Nobody has run this layer for the rows that are here, and nobody will look at what it holds for them.
            self.allocate(other.keys[:0], other.values[:0])
        elif moves:
            self.allocate(self.keys, self.values)
        self.show_rows()
        theirs = (other.keys, other.values) if other.is_initialized else (None, None)
        for whole, new in zip(self._storage, theirs, strict=True):
            place = whole[before : self.owner.batch]
            # What a row left behind is finite, but head layers may be read before they are written.
            place.zero_()
            if new is not None:
                place[:, :, :end] = new[:, :, :end]

    def free(self) -> None:
        """Let go of keys and values."""
        if self.is_initialized:
            del self.keys, self.values, self._storage
            self.is_initialized = False

    def select(self, from_R: Tensor, to_R: Tensor, *, end: int, shrinks: bool) -> None:
        """Keep some rows; see `RaggedCache.select`."""
        if not self.is_initialized:
            return
        if len(to_R):
            for whole in self._storage:
                whole[to_R, :, :end] = whole[from_R, :, :end]
        self.show_rows()
        if shrinks:
            self.allocate(self.keys, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the current forward's keys and values at its slots and return the visible ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner, view = self.owner, self.view
        if owner.slots_BM is None:
            self.keys.narrow(2, owner.position, owner.width).copy_(key_states)
            self.values.narrow(2, owner.position, owner.width).copy_(value_states)
        else:
            self.keys[owner.rows_B1, :, owner.slots_BM] = key_states.transpose(1, 2)
            self.values[owner.rows_B1, :, owner.slots_BM] = value_states.transpose(1, 2)
        return self.keys.narrow(2, view.start, view.length), self.values.narrow(2, view.start, view.length)

    def get_seq_length(self) -> int:
        """Position of the current forward's first query where all rows share one."""
        return self.owner.position

    def get_max_length(self) -> int:
        """Capacity in slots."""
        return self.owner.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible slots and the first of them, for families that build their own mask."""
        return self.view.length, self.view.start


class RaggedCache(Cache):  # type: ignore[misc]
    """One `RaggedLayer` per layer of base and heads, all written at the slots that `begin` names.

    Attributes:
        capacity: the most slots per row.
        allocated: slots per row that the layers have now.
        views: one per attention window, shared by its layers.
        position: first slot of the current forward where all rows share it.
        width: M of the current forward.
        slots_BM: slots of the current forward where rows differ, else None.
        hidden: head layer -> bool [B, C], slots that hold nothing for it (`headway.decoding.gaps`).
        allocated_rows: rows that the layers have room for, the batch's first.
        end: first slot after those of the current forward; nothing that counts lies beyond it.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        *,
        batch: int,
        capacity: int,
        device: torch.device,
        initial: int | None = None,
    ) -> None:
        """Make empty layers.

        Args:
            windows: attention window of each layer, heads included; None sees everything.
            batch: B.
            capacity: C.
            device: where positions live.
            initial: slots to begin with; None for all of them at once.
        """
        self.views: dict[int | None, SlotView] = {window: SlotView(window) for window in windows}
        self.capacity = capacity
        self.allocated = capacity if initial is None else max(1, min(initial, capacity))
        self.position = 0
        self.width = 0
        self.slots_BM: Tensor | None = None
        self.hidden: dict[int, Tensor] = {}
        self.allocated_rows = batch
        self.end = 0
        self.rows_B1 = torch.arange(batch, device=device)[:, None]
        super().__init__(layers=[RaggedLayer(self, self.views[window]) for window in windows])

    @property
    def batch(self) -> int:
        """B."""
        return self.rows_B1.shape[0]

    def begin_aligned(self, position: int, width: int) -> None:
        """The next forward writes slots position .. position + width - 1 of every row.

        Raises:
            DecodingError: beyond the capacity.
        """
        self._make_room(position + width)
        self.position, self.width, self.slots_BM = position, width, None
        self.end = position + width
        for view in self.views.values():
            view.cover(position, position + width)

    def begin_ragged(self, slots_BM: Tensor, *, first: int, end: int) -> None:
        """The next forward writes `slots_BM`, which lie in first .. end - 1.

        Raises:
            DecodingError: beyond the capacity.
        """
        self._make_room(end)
        self.position, self.width, self.slots_BM = first, slots_BM.shape[1], slots_BM
        self.end = end
        for view in self.views.values():
            view.cover(first, end)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What every attention layer calls: store, and return what it may look at."""
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    def hide(self, index: int, value: Any) -> Any:
        """Where `value` is a mask [B or 1, 1, M, S] of layer `index`: the same without that layer's hidden slots."""
        hidden_BC = self.hidden.get(index)
        if hidden_BC is None or not isinstance(value, Tensor) or value.ndim != 4:
            return value
        view = self.layers[index].view
        hidden_B11S = hidden_BC[:, None, None, view.start : view.start + view.length]
        return value.expand(hidden_BC.shape[0], -1, -1, -1).masked_fill(hidden_B11S, torch.finfo(value.dtype).min)

    def move(self, from_BA: Tensor, to_BA: Tensor) -> None:
        """Copy slots of every row, in all layers: what an accepted path of a tree does before the next block.

        Args:
            from_BA: slots to copy.
            to_BA: where to; slots that stay are named in both.
        """
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[self.rows_B1, :, to_BA] = layer.keys[self.rows_B1, :, from_BA]
                layer.values[self.rows_B1, :, to_BA] = layer.values[self.rows_B1, :, from_BA]

    def absorb(self, other: RaggedCache, *, rows: int) -> None:
        """Append the rows of another cache of the same model.

        Args:
            other: not to be used afterwards.
            rows: to have room for, so that not every newcomer moves everybody else; the batch at least.
        """
        before = self.batch
        self.rows_B1 = torch.arange(before + other.batch, device=self.rows_B1.device)[:, None]
        self.capacity = max(self.capacity, other.capacity)
        wanted = min(max(self.allocated, other.allocated), self.capacity), max(rows, self.batch)
        moves = wanted != (self.allocated, self.allocated_rows)
        self.allocated, self.allocated_rows = wanted
        for own, new in zip(self.layers, other.layers, strict=True):
            own.absorb(new, before=before, end=other.end, moves=moves)
            # No more than one layer is held twice at any time.
            new.free()
        for index in {*self.hidden, *other.hidden}:
            mine_BC, theirs_BC = self._hidden_slots(index, before), other._hidden_slots(index, other.batch)
            self.hidden[index] = torch.cat(
                [F.pad(hidden_BC, (0, self.capacity - hidden_BC.shape[1])) for hidden_BC in (mine_BC, theirs_BC)]
            )
        self.end = max(self.end, other.end)

    def allocate_rows(self, rows: int) -> None:
        """Have room for so many rows, the batch's at least."""
        if max(rows, self.batch) != self.allocated_rows:
            self.allocated_rows = max(rows, self.batch)
            for layer in self.layers:
                if layer.is_initialized:
                    layer.grow()

    def select(self, rows: Sequence[int], *, capacity: int) -> None:
        """Keep some rows, in the order given; slots are given back where less than half of them can still be reached.

        Args:
            rows: of the batch; those that keep their place are not moved.
            capacity: slots per row at the limit, of the rows that stay.
        """
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        to_R, from_R = torch.tensor(moved, device=self.rows_B1.device).reshape(-1, 2).T
        kept = torch.tensor(list(rows), device=self.rows_B1.device)
        self.rows_B1 = torch.arange(len(rows), device=self.rows_B1.device)[:, None]
        self.capacity = capacity
        shrinks = 2 * capacity <= self.allocated or 4 * len(rows) <= self.allocated_rows
        if shrinks:
            self.allocated = min(self.allocated, capacity)
            self.allocated_rows = min(self.allocated_rows, 2 * len(rows))
        self.end = min(self.end, self.allocated)
        for layer in self.layers:
            layer.select(from_R, to_R, end=self.end, shrinks=shrinks)
        self.hidden = {index: hidden_BC[kept][:, :capacity] for index, hidden_BC in self.hidden.items()}

    def _hidden_slots(self, index: int, batch: int) -> Tensor:
        nothing_BC = torch.zeros(batch, self.capacity, dtype=torch.bool, device=self.rows_B1.device)
        return self.hidden.get(index, nothing_BC)

    def _make_room(self, end: int) -> None:
        if end > self.capacity:
            raise DecodingError(f"the cache holds {self.capacity} slots per row, {end} are needed; make it larger")
        if end > self.allocated:
            self.allocated = min(self.capacity, max(end, 2 * self.allocated))
            # One layer after the other: no more than one is held twice at any time.
            for layer in self.layers:
                if layer.is_initialized:
                    layer.grow()


def _with_room(old_BHSD: Tensor, rows: int, slots: int) -> Tensor:
    batch, heads, filled, width = old_BHSD.shape
    kept = min(filled, slots)
    new_RHSD = old_BHSD.new_zeros(rows, heads, slots, width)
    new_RHSD[:batch, :, :kept] = old_BHSD[:, :, :kept]
    return new_RHSD


def attention_windows(config: Any, *, num_heads: int) -> list[int | None]:
    """The attention window of every layer of the base and then of every head; heads do as the base's last layer.

    Raises:
        DecodingError: a layer type whose cache cannot be taken back.
    """
    window = getattr(config, "sliding_window", None)
    kinds: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        unknown = sorted({str(kind) for kind in layer_types} - kinds.keys())
        if unknown:
            raise DecodingError(
                f"layers of type {', '.join(unknown)} cannot take drafted tokens back; use model.base.generate(...)"
            )
        windows = [kinds[kind] for kind in layer_types]
    else:
        windows = [window] * int(config.num_hidden_layers)
    return windows + [windows[-1]] * num_heads
