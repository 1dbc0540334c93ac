"""Running base and heads on blocks: the Hugging Face model with the ragged cache.

Legend: B rows, M positions of a block, D width, V vocabulary, K drafted tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.decoding.cache import RaggedCache, attention_windows
from headway.decoding.draft_places import ForwardColumns, block_slots, branches, keeps_drafts
from headway.decoding.gaps import REREAD, HeadGaps
from headway.decoding.head_reader import HeadReader
from headway.decoding.masks import BlockMasks
from headway.decoding.prefill import pieces, reads_at_once
from headway.decoding.prompts import Prompts
from headway.decoding.room import check_room
from headway.functional.row_trees import DynamicTree, RowTrees, after_known
from headway.functional.tree import Tree
from headway.heads.base import DraftPoint, Heads
from headway.model.output import OffsetHiddenStates

FIRST_NEW_TOKENS = 64
"""New tokens per row that the cache has room for before it grows."""


class EagerExecutor(HeadReader):
    """The model as it is, on one batch: prefill once, then block after block.

    A block is [last known token, draft]; its keys and values go to slots position .. position + M - 1 of each row.
    Going back after a rejected draft is calling `block` with smaller positions. Where heads ask for it (`Heads.lookback`),
    a pass repeats known tokens before the block, whose slots then get what they held, or what is right by now.

    Attributes:
        cache: keys and values of base and heads.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        num_draft_tokens: int,
        tree: Tree | DynamicTree | None = None,
        changing: bool = False,
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        """Prepare the cache for prompts + new tokens + one draft.

        Args:
            model: a `MultiTokenLM`.
            prompts: the batch; only `ids_BP` and `lengths` are used.
            max_new_tokens: the most tokens a row can get.
            num_draft_tokens: K of the heads; without drafts of theirs the cache has no head layers.
            tree: the largest block; None for a chain of the heads' drafts.
            changing: whether drafts may be shorter than K at times, so that `num_offsets` changes from block to block.
            prefill_chunk_tokens: the most tokens of a prompt that one forward reads; None reads any prompt in one.

        Raises:
            DecodingError: the cache at its limit takes more memory than is free.
        """
        self._model = model
        self._prompts = prompts
        embedding = model.get_input_embeddings().weight
        self.device = embedding.device
        # The last token of a row is emitted but never fed, so positions end two before prompt + new tokens; beyond it
        # lie only drafts that the limit will cut, whose position does not matter as long as the model has it.
        self._last_position = max(prompts.lengths) + max_new_tokens - 2
        self._lookback: int = model.heads.lookback(num_draft_tokens)
        most_repeated = most_repeated_tokens(model.heads, num_draft_tokens, changing=changing)
        width = block_slots(model.heads, num_draft_tokens, tree)
        self._chunk = None if reads_at_once(model.config) else prefill_chunk_tokens
        self._num_draft_tokens = num_draft_tokens
        self._head_layers: int = model.heads.cache_layers(num_draft_tokens)
        capacity = max(prompts.lengths) + max_new_tokens + width - 1 + most_repeated
        windows = attention_windows(model.config, num_heads=self._head_layers)
        self._by_path = keeps_drafts(model.heads, num_draft_tokens) and branches(tree)
        self._head_window = windows[-1]
        self._columns = ForwardColumns((), ())
        self.cache = self._new_cache(windows, capacity=capacity, max_new_tokens=max_new_tokens)
        self._gaps = HeadGaps(model.heads, self.cache, longest=num_draft_tokens) if changing else None
        self._unwritten: deque[tuple[list[int], Tensor]] = deque(maxlen=most_repeated + 1)
        self._repeats = bool(self._lookback or (self._gaps is not None and self._gaps.reread))
        self._widest = width + most_repeated
        self._known = None
        columns = prompts.ids_BP.shape[1]
        self._in_pieces = self._chunk is not None and columns > self._chunk
        self._pieces = deque(pieces(columns - 1, self._chunk) if self._chunk and self._in_pieces else ())
        self._fit_to_cache()

    def _fit_to_cache(self) -> None:
        """Make what depends on the rows of the batch and on their room."""
        cache = self.cache
        dtype = self._model.get_input_embeddings().weight.dtype
        self._masks = BlockMasks(self._model.config, cache, width=self._widest, dtype=dtype, device=self.device)
        self._positions_BC = torch.arange(cache.capacity, device=self.device).expand(cache.batch, -1)
        self._rows_B = torch.arange(cache.batch, device=self.device)

    def _new_cache(self, windows: Sequence[int | None], *, capacity: int, max_new_tokens: int) -> RaggedCache:
        """A cache for the batch, once it is known to fit."""
        check_room(
            self._model,
            batch=self._prompts.batch,
            capacity=capacity,
            num_head_layers=self._head_layers,
            max_new_tokens=max_new_tokens,
        )
        return RaggedCache(
            windows,
            batch=self._prompts.batch,
            capacity=capacity,
            device=self.device,
            initial=capacity - max_new_tokens + FIRST_NEW_TOKENS,
        )

    @property
    def heads_need_prompts(self) -> bool:
        """Whether heads keep keys and values that only a pass through them makes."""
        return self._gaps is not None and bool(self._gaps.reread)

    def prefill(self, *, num_offsets: int) -> OffsetHiddenStates:
        """Read the prompts, or what `read_piece` has left of them; hidden states [B, 1, D] at each row's last token."""
        while self.pieces_left:
            self.read_piece()
        ids_BP = self._prompts.ids_BP.to(self.device)
        columns = ids_BP.shape[1]
        if self._repeats:
            self._text_BC = torch.zeros_like(self._positions_BC)
            self._text_BC[:, :columns] = ids_BP
        if self._in_pieces:
            last_B = torch.tensor(self._prompts.lengths, device=self.device) - 1
            return self.block(ids_BP.gather(1, last_B[:, None]), last_B.tolist(), num_offsets=num_offsets)
        self.cache.begin_aligned(0, columns)
        # Without a mask the family makes its own causal or windowed one, or none at all where attention can do without.
        # Filler at the end of short rows is behind every real token's back and its slots are overwritten later.
        states = self._run(ids_BP, None, self._positions_BC.narrow(1, 0, columns), num_offsets)
        last_B = torch.tensor(self._prompts.lengths, device=self.device) - 1
        self._columns = ForwardColumns([0] * len(last_B), [length - 1 for length in self._prompts.lengths])
        self._remember(states, ids_BP, last_B)
        if min(self._prompts.lengths) == columns:
            return _select(states, slice(columns - 1, columns))
        return self._gather(states, last_B[:, None])

    @property
    def pieces_left(self) -> int:
        """Pieces of the prompts to read before `prefill` reads the rest; none of prompts that are one piece."""
        return len(self._pieces)

    def read_piece(self) -> None:
        """Read the next piece of long prompts, for callers who have other things to do between two pieces.

        A piece is a forward of at most `chunk` columns, which attends to what the cache holds. None is needed for more than
        its keys and values; what follows the last one is a block of each row's last token, which gives everything that
        decoding and heads that draft in turn go on from, wherever in the batch's columns that token stands. Filler that
        short rows were read with lies behind it and is overwritten in time.
        """
        start, end = self._pieces.popleft()
        ids_BP = self._prompts.ids_BP.to(self.device)
        # Heads without keys and values have nothing to keep of a prompt.
        head_offsets = 1 + self._num_draft_tokens if self._head_layers else 1
        self.cache.begin_aligned(start, end - start)
        slots_BM = self._positions_BC[:, start:end]
        mask = self._masks.ragged(slots_BM[:1]) if start else None
        states = self._run(ids_BP[:, start:end], mask, slots_BM, head_offsets)
        if self._model.heads.reads_tokens and self._head_layers:
            self._read_on(states, ids_BP, start, end)

    def _read_on(self, states: OffsetHiddenStates, ids_BP: Tensor, start: int, end: int) -> None:
        """Let heads that read tokens store a piece's keys and values, with the text after it in place of a draft."""
        assert states.head_inputs is not None
        ends_B = torch.full_like(self._rows_B, end - start - 1)
        point = DraftPoint(states.head_inputs, states.future_hidden, ids_BP[:, start:end], ends_B)
        step = self._model.heads.begin_draft(point)
        last = ids_BP.shape[1] - 1
        for depth in range(1, self._num_draft_tokens + 1):
            # Entries that would need tokens behind the prompt are made again with the block that follows.
            column = min(end - 1 + depth, last)
            step(depth + 1, ids_BP[:, column : column + 1], None)

    def block(self, block_BM: Tensor, positions: Sequence[int], *, num_offsets: int) -> OffsetHiddenStates:
        """One forward of base and heads over a block.

        Args:
            block_BM: the last known token of each row and its draft.
            positions: position of each row's last known token.
            num_offsets: heads beyond this offset are not run.

        Returns:
            Hidden states [B, M, D]; offset 1 after the final norm, the others before it.
        """
        if self._repeats:
            back = self._lookback if self._gaps is None else self._gaps.begin(positions, num_offsets - 1)
            return self._block_after(back, block_BM, positions, num_offsets=num_offsets)
        states = self._block(block_BM, positions, num_offsets=num_offsets)
        self._columns = ForwardColumns(list(positions), [0] * len(positions))
        self._remember(states, block_BM, torch.zeros_like(self._rows_B))
        return states

    def _block(self, block_BM: Tensor, positions: Sequence[int], *, num_offsets: int) -> OffsetHiddenStates:
        width = block_BM.shape[1]
        low, high = min(positions), max(positions)
        if low == high:
            self.cache.begin_aligned(low, width)
            return self._run(block_BM, self._masks.aligned(), self._positions_BC.narrow(1, low, width), num_offsets)
        start_B1 = torch.tensor(positions, device=self.device)[:, None]
        slots_BM = start_B1 + self._positions_BC.narrow(1, 0, width)
        self.cache.begin_ragged(slots_BM, first=low, end=high + width)
        positions_BM = slots_BM.clamp(max=self._last_position)
        return self._run(block_BM, self._ragged_mask(slots_BM), positions_BM, num_offsets)

    def _ragged_mask(self, slots_BM: Tensor) -> Any:
        """What the model takes for a block of chains whose rows stand at different positions."""
        return self._masks.ragged(slots_BM)

    def tree_block(
        self, block_BR: Tensor, positions: Sequence[int], tree: Tree | RowTrees, *, num_offsets: int
    ) -> OffsetHiddenStates:
        """One forward of base and heads over a candidate tree; `keep` says afterwards which path stands.

        Args:
            block_BR: the last known token of each row, and a token for every other node.
            positions: position of each row's last known token.
            tree: shape, of all rows or of each.
            num_offsets: heads beyond this offset are not run.

        Returns:
            Hidden states [B, R, D].
        """
        back = self._lookback
        if self._gaps is not None:
            back = self._gaps.begin(positions, num_offsets - 1, room=self._by_path)
        self._tree_block_BR = block_BR
        if back:
            return self._tree_block_after(back, block_BR, positions, tree, num_offsets=num_offsets)
        states = self._tree_block(block_BR, positions, tree, num_offsets=num_offsets)
        self._columns = ForwardColumns(list(positions), [0] * len(positions), tree)
        self._remember(states, block_BR, torch.zeros_like(self._rows_B))
        return states

    def _tree_block_after(
        self, back: int, block_BR: Tensor, positions: Sequence[int], tree: Tree | RowTrees, *, num_offsets: int
    ) -> OffsetHiddenStates:
        """The same with known tokens before it: a larger tree, which begins with a chain."""
        self._write_text()
        starts = [max(0, position - back) for position in positions]
        roots = [position - start for position, start in zip(positions, starts, strict=True)]
        # What lies behind a short row's tree is overwritten in time.
        whole = after_known(tree, roots)
        start_B1, root_B1 = (torch.tensor(own, device=self.device)[:, None] for own in (starts, roots))
        columns_BR = root_B1 + self._positions_BC[:1, : len(tree)]
        window_BW = self._text_BC.gather(1, start_B1 + self._positions_BC[:1, : len(whole)])
        window_BW.scatter_(1, columns_BR, block_BR)
        states = self._tree_block(window_BW, starts, whole, num_offsets=num_offsets)
        self._columns = ForwardColumns(starts, roots, tree)
        self._remember(states, window_BW, root_B1[:, 0])
        return self._gather(states, columns_BR)

    def _tree_block(
        self, block_BR: Tensor, positions: Sequence[int], tree: Tree | RowTrees, *, num_offsets: int
    ) -> OffsetHiddenStates:
        width, low, high = len(tree), min(positions), max(positions)
        root_B1 = torch.tensor(positions, device=self.device)[:, None]
        if low == high:
            self.cache.begin_aligned(low, width)
        else:
            slots_BR = root_B1 + self._positions_BC.narrow(1, 0, width)
            self.cache.begin_ragged(slots_BR, first=low, end=high + width)
        mask: Any
        if isinstance(tree, RowTrees):
            depths = torch.tensor([own.depths for own in tree.trees], device=self.device)
            mask = self._masks.row_trees(tree, root_B1)
        else:
            depths = torch.tensor(tree.depths, device=self.device)
            mask = self._masks.aligned_tree(tree) if low == high else self._masks.ragged_tree(tree, root_B1)
        positions_BR = (root_B1 + depths).clamp(max=self._last_position)
        return self._run(block_BR, mask, positions_BR, num_offsets)

    def keep(self, paths: Sequence[Sequence[int]], positions: Sequence[int]) -> None:
        """Move the keys and values of each row's accepted path to the slots after its root.

        Args:
            paths: per row the accepted nodes of the last tree, from below its root downwards.
            positions: of the roots.
        """
        if self._repeats:
            self._write_text()
            for row, (at, path) in enumerate(self._each(positions, paths)):
                nodes = torch.tensor([0, *path], device=self.device)
                self._text_BC[row, at : at + len(nodes)] = self._tree_block_BR[row, nodes]
        if all(tuple(path) == tuple(range(1, len(path) + 1)) for path in paths):
            return
        longest = max(map(len, paths))
        # A row with a shorter path copies its root onto itself.
        from_BA = [
            [at + node for node in (*path, *[0] * (longest - len(path)))] for at, path in self._each(positions, paths)
        ]
        to_BA = [
            [at + step if step <= len(path) else at for step in range(1, longest + 1)]
            for at, path in self._each(positions, paths)
        ]
        self.cache.move(torch.tensor(from_BA, device=self.device), torch.tensor(to_BA, device=self.device))

    @staticmethod
    def _each(positions: Sequence[int], paths: Sequence[Sequence[int]]) -> list[tuple[int, Sequence[int]]]:
        return list(zip(positions, paths, strict=True))

    def _block_after(
        self, back: int, block_BM: Tensor, positions: Sequence[int], *, num_offsets: int
    ) -> OffsetHiddenStates:
        """The same over a window that begins earlier; what lies behind a short row's block is overwritten in time."""
        back = min(back, max(positions))
        if back == 0:
            # Written only when they are repeated, so that a forward without drafts costs what plain decoding does.
            self._unwritten.append((list(positions), block_BM))
            states = self._block(block_BM, positions, num_offsets=num_offsets)
            self._columns = ForwardColumns(list(positions), [0] * len(positions))
            self._remember(states, block_BM, torch.zeros_like(self._rows_B))
            return states
        self._unwritten.append((list(positions), block_BM))
        self._write_text()
        position_B1 = torch.tensor(positions, device=self.device)[:, None]
        columns_1M = self._positions_BC[:1, : block_BM.shape[1]]
        starts = [max(0, position - back) for position in positions]
        start_B1 = torch.tensor(starts, device=self.device)[:, None]
        window_BW = self._text_BC.gather(1, start_B1 + self._positions_BC[:1, : back + block_BM.shape[1]])
        states = self._block(window_BW, starts, num_offsets=num_offsets)
        first_B1 = position_B1 - start_B1
        self._columns = ForwardColumns(starts, [at - start for at, start in zip(positions, starts, strict=True)])
        self._remember(states, window_BW, first_B1[:, 0])
        return self._gather(states, first_B1 + columns_1M)

    def _write_text(self) -> None:
        """Bring the text up to date with what was fed last, in the order in which it was fed."""
        while self._unwritten:
            at, tokens_BM = self._unwritten.popleft()
            at_B1 = torch.tensor(at, device=self.device)[:, None]
            self._text_BC.scatter_(1, at_B1 + self._positions_BC[:1, : tokens_BM.shape[1]], tokens_BM)

    def absorb(self, other: EagerExecutor, positions: Sequence[int], *, rows: int) -> None:
        """Append the rows of another executor of the same model and options, between two forwards.

        Args:
            other: has read its prompts, with all heads that will run; not to be used afterwards.
            positions: of its rows' last known tokens.
            rows: to have room for in the cache (`RaggedCache.absorb`).
        """
        if self._repeats:
            self._write_text()
            other._write_text()
        self.cache.absorb(other.cache, rows=rows)
        self._fit_to_cache()
        self._last_position = max(self._last_position, other._last_position)
        self._known = None
        if self._gaps is not None:
            self._gaps.absorb(positions)
        if self._repeats:
            capacity = self.cache.capacity
            self._text_BC = torch.cat(
                [F.pad(text_BC, (0, capacity - text_BC.shape[1])) for text_BC in (self._text_BC, other._text_BC)]
            )

    def select(self, rows: Sequence[int], *, capacity: int) -> None:
        """Keep some rows, in the order given, between two forwards (`RaggedCache.select`)."""
        if self._repeats:
            self._write_text()
            self._text_BC = self._text_BC[torch.tensor(list(rows), device=self.device), :capacity]
        self.cache.select(rows, capacity=capacity)
        self._fit_to_cache()
        self._known = None
        if self._gaps is not None:
            self._gaps.select(rows)

    def _run(self, ids: Tensor, mask: Any, position_ids: Tensor, num_offsets: int) -> OffsetHiddenStates:
        states: OffsetHiddenStates = self._model.offset_hidden_states(
            ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            # Heads that read drafted tokens have nothing to read yet.
            num_offsets=1 if self._model.heads.reads_tokens else num_offsets,
        )
        return states

    def _gather(self, states: OffsetHiddenStates, columns_BM: Tensor) -> OffsetHiddenStates:
        """Hidden states at given columns of each row."""
        rows_B1 = self._rows_B[:, None]
        return OffsetHiddenStates(
            last_hidden_BTD=states.last_hidden_BTD[rows_B1, columns_BM],
            future_hidden=tuple(head_BTD[rows_B1, columns_BM] for head_BTD in states.future_hidden),
        )


def most_repeated_tokens(heads: Heads, num_draft_tokens: int, *, changing: bool) -> int:
    """The most known tokens that a forward repeats before its block.

    Args:
        heads: of the model.
        num_draft_tokens: K of the heads.
        changing: whether drafts may be shorter than K at times.
    """
    lookback = heads.lookback(num_draft_tokens)
    return max(lookback, REREAD) if changing else lookback


def _select(states: OffsetHiddenStates, columns: slice) -> OffsetHiddenStates:
    return OffsetHiddenStates(
        last_hidden_BTD=states.last_hidden_BTD[:, columns],
        future_hidden=tuple(head_BTD[:, columns] for head_BTD in states.future_hidden),
    )
