"""The graph executor: base, heads, acceptance and the next draft as one step on the device.

Legend: B rows, M positions of a block, W positions of a pass, D width, V vocabulary, K drafted tokens, C capacity in slots.

    block [B, M] -> lean layers and heads -> own tokens [B, M] -> how much stands, ends, limits -> next block
       ^ buffers that stay where they are                                                             |
       +----------------------------------------------------------------------------------------------+

Nothing in a step waits for the host, and no shape depends on what is in a tensor: rows stand at different positions, which
are in a tensor; attention reads the first `slots` of the cache, a power of two; rows that have ended go on without effect.
So a step can be captured once per shape (`headway.decoding.graphs.capture`) and replayed. The host reads what a step gave
from a queue, while the next one is running.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from headway.decoding.cache import RaggedCache, attention_windows
from headway.decoding.graphs.capture import StepGraphs, StepShape, power_of_two, settings_for, slots_bucket
from headway.decoding.graphs.emission import Choice, Emitted, emit_chain
from headway.decoding.graphs.state import FAILED, RecordQueue, RowRecord, StepState
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.model import LeanModel
from headway.decoding.prompts import Prompts
from headway.errors import DecodingError
from headway.model.output import OffsetHiddenStates

SLOTS_AT_A_TIME = 256
"""A workspace's capacity is a multiple of it, so that generations of similar length can use the same."""


MOST_ROWS_AT_ONCE_ON_CUDA = 128
"""Rows up to which a product with the unembedding is bound by reading it: tensor cores do some hundred operations of bfloat16
in the time of reading one byte (data sheets; not measured here)."""


class Workspace:
    """What graphs of one model are tied to: a cache and the buffers of a step, where they lie.

    Attributes:
        cache: of base and heads.
        state: the buffers.
        graphs: captured steps.
    """

    def __init__(self, cache: RaggedCache, state: StepState, graphs: StepGraphs) -> None:
        self.cache = cache
        self.state = state
        self.graphs = graphs
        self._user: weakref.ref[Any] | None = None

    @property
    def in_use(self) -> bool:
        """Whether a generation that has not ended works with it."""
        user = None if self._user is None else self._user()
        return user is not None and not user.done

    def take(self, user: GraphExecutor) -> None:
        """Make it a generation's."""
        self._user = weakref.ref(user)


_KEPT: weakref.WeakKeyDictionary[LeanModel, dict[int, Workspace]] = weakref.WeakKeyDictionary()
"""Per model and number of rows the last workspace: graphs are worth keeping, and the next request is often like the last."""


def forget(model: LeanModel) -> None:
    """Give back what is kept for a model between generations: its graphs, their buffers and its caches."""
    if _KEPT.pop(model, None) is not None:
        # A cache and its layers refer to each other.
        gc.collect()


class GraphExecutor(LeanExecutor):
    """`LeanExecutor` whose steps leave the host out. Chains only.

    The batch is filled up to a power of two with rows that have ended.

    Attributes:
        done: whether nobody will ask for a step any more.
        ahead: steps that may be on their way beyond the one whose result is waited for.
    """

    _workspace: Workspace

    def __init__(
        self,
        model: LeanModel,
        prompts: Prompts,
        *,
        max_new_tokens: int,
        num_draft_tokens: int,
        choice: Choice,
        end_token_ids: frozenset[int] = frozenset(),
        uniforms: Sequence[Sequence[float]] | None = None,
        prefill_chunk_tokens: int | None = None,
    ) -> None:
        """Take a workspace, or make one.

        Args:
            model: on a CUDA device, unless `headway.decoding.graphs.capture.graph_settings` says otherwise.
            prompts: the batch.
            max_new_tokens: the most tokens a row can get.
            num_draft_tokens: K.
            choice: the model's own token at a position.
            end_token_ids: tokens that end a text.
            uniforms: per row of `prompts` max_new_tokens + K numbers, where the choice draws.
            prefill_chunk_tokens: see `EagerExecutor`.

        Raises:
            DecodingError: no CUDA device, or a cache that does not fit.
        """
        settings = settings_for(_embedding(model).device)
        self.done = False
        self.ahead = settings.ahead
        assert settings.capture is not None
        self._capture = settings.capture
        self._lean = model
        self._choice = choice
        self._ends = end_token_ids
        self._uniforms = uniforms
        self._rows = prompts.batch
        self._rooms = [max_new_tokens] * prompts.batch
        super().__init__(
            model,
            _filled_up(prompts),
            max_new_tokens=max_new_tokens,
            num_draft_tokens=num_draft_tokens,
            prefill_chunk_tokens=prefill_chunk_tokens,
        )
        if self.device.type == "cuda":
            self._most_at_once = MOST_ROWS_AT_ONCE_ON_CUDA
        self._workspace.take(self)
        self._state, self._graphs = self._workspace.state, self._workspace.graphs
        self._queue = RecordQueue(self._state.record_BR, length=1 + self.ahead)

    @property
    def graphs(self) -> StepGraphs:
        """The captured steps, of this and earlier generations."""
        return self._graphs

    @property
    def state(self) -> StepState:
        """The buffers."""
        return self._state

    @property
    def in_flight(self) -> int:
        """Steps whose results have not been read."""
        return len(self._queue)

    def _new_cache(self, windows: Sequence[int | None], *, capacity: int, max_new_tokens: int) -> RaggedCache:
        """The cache of the workspace that is kept for the model and so many rows, if it fits; else of a new one."""
        batch = self._prompts.batch
        kept = _KEPT.get(self._lean, {}).get(batch)
        if kept is not None and not kept.in_use:
            if kept.cache.capacity >= capacity and kept.graphs.captures_like(self._capture):
                # As in a new one: head layers may be read before they are written.
                for layer in kept.cache.layers:
                    if layer.is_initialized:
                        layer.keys.zero_()
                        layer.values.zero_()
                self._workspace = kept
                return kept.cache
            del _KEPT[self._lean][batch]
            kept = None
            gc.collect()
        self._workspace = self._new_workspace(capacity, max_new_tokens)
        if kept is None:
            _KEPT.setdefault(self._lean, {})[batch] = self._workspace
        return self._workspace.cache

    def _new_workspace(self, capacity: int, max_new_tokens: int) -> Workspace:
        """One for all heads of the model, so that requests with other draft lengths can use it too."""
        heads, batch = self._lean.heads, self._prompts.batch
        most = self._lean.num_future_tokens - 1
        # Layers take memory when they are first written, so those of heads that never run take none.
        windows = attention_windows(self._lean.config, num_heads=heads.cache_layers(most))
        capacity = -(-(capacity + most + heads.lookback(most)) // SLOTS_AT_A_TIME) * SLOTS_AT_A_TIME
        try:
            cache = super()._new_cache(windows, capacity=capacity, max_new_tokens=max_new_tokens)
        except DecodingError:
            # What is kept for other numbers of rows is needed more here.
            forget(self._lean)
            cache = super()._new_cache(windows, capacity=capacity, max_new_tokens=max_new_tokens)
        # Slots that were added later would lie elsewhere.
        cache.allocated = capacity
        state = StepState.empty(
            batch=batch,
            width=most + 1,
            capacity=capacity,
            vocabulary=_embedding(self._lean).shape[0],
            device=self.device,
        )
        return Workspace(cache, state, StepGraphs(self._capture, self.device))

    def begin(self) -> None:
        """Read the prompts, choose each row's first token and draft what follows; the record is on its way."""
        prompts = self._prompts
        self._state.begin(
            lengths=prompts.lengths,
            rooms=[*self._rooms, *[0] * (prompts.batch - self._rows)],
            ends=self._ends,
            uniforms=self._uniforms,
            ids_BP=prompts.ids_BP.to(self.device),
        )
        states = self.prefill(num_offsets=1 + self._num_draft_tokens)
        last_B = torch.tensor(prompts.lengths, device=self.device) - 1
        self._conclude(states, prompts.ids_BP.to(self.device).gather(1, last_B[:, None]), self._num_draft_tokens)
        self._queue.push()

    def launch(self, last_positions: Sequence[int]) -> None:
        """Ask for the next step.

        Args:
            last_positions: of the last known token of each row that goes on, as the last record that was read tells.
        """
        verified = drafted = self._num_draft_tokens
        # Every step on its way may emit a whole block.
        position = max(last_positions) + self.in_flight * (1 + verified)
        needed = max(position + 1 + verified, self._lookback + 1 + verified)
        slots = slots_bucket(min(needed, self.cache.capacity), self.cache.capacity)
        shape = StepShape(self._prompts.batch, verified, drafted, slots, self._choice.key)
        self._graphs.run(shape, lambda: self.static_step(verified=verified, drafted=drafted, slots=slots), self._keep)
        self._queue.push()

    def read(self) -> list[RowRecord]:
        """Wait for the oldest step on its way; what it gave each row."""
        return self._queue.pop(self._rows)

    def _keep(self) -> Any:
        kept = self._state.snapshot()
        return lambda: self._state.restore(kept)

    # ------------------------------------------------------------------------------------------------ on the device

    def static_step(self, *, verified: int, drafted: int, slots: int) -> None:
        """One step, a function of the buffers and of these numbers alone.

        Args:
            verified: drafted tokens of the block that it reads.
            drafted: tokens that it drafts.
            slots: of the cache, that attention reads.
        """
        state = self._state
        block_BM = state.block_BW[:, : verified + 1]
        columns_1M = self._positions_BC[:1, : verified + 1]
        tokens_BW, start_B1 = block_BM, state.positions_B[:, None]
        if self._lookback:
            state.text_BC.scatter_(1, start_B1 + columns_1M, block_BM)
            start_B1 = (start_B1 - self._lookback).clamp(min=0)
            window_1W = self._positions_BC[:1, : self._lookback + verified + 1]
            tokens_BW = state.text_BC.gather(1, start_B1 + window_1W)
        slots_BW = start_B1 + self._positions_BC[:1, : tokens_BW.shape[1]]
        self.cache.begin_ragged(slots_BW, first=0, end=slots)
        states = self._run(tokens_BW, self._masks.ragged(slots_BW), slots_BW, 1 + self._num_draft_tokens)
        first_B = state.positions_B - start_B1[:, 0]
        self._remember(states, tokens_BW, first_B)
        if self._lookback:
            states = self._gather(states, first_B[:, None] + columns_1M)
        self._conclude(states, block_BM, drafted)

    def _conclude(self, states: OffsetHiddenStates, block_BM: Tensor, drafted: int) -> None:
        """From hidden states to the next block: choose, emit, draft."""
        state = self._state
        width = block_BM.shape[1]
        numbers_BM = state.uniforms_BC.gather(1, state.made_B[:, None] + self._positions_BC[:1, :width])
        target_BM, failed_BM = self._choice(self.logits(states.last_hidden_BTD), numbers_BM)
        emitted = self._emit(block_BM, target_BM)
        flags_B = emitted.finished_B.long()
        if failed_BM is not None:
            stands_BM = self._positions_BC[:1, :width] < emitted.counts_B[:, None]
            flags_B = flags_B + FAILED * (failed_BM & stands_BM).any(dim=1)
        state.record_BR[:, :width] = target_BM
        state.record_BR[:, -3:] = torch.stack((emitted.counts_B, emitted.accepted_B, flags_B), dim=1)
        nodes_B = (emitted.counts_B - 1).clamp(min=0)
        last_B = target_BM.gather(1, nodes_B[:, None])[:, 0]
        if drafted:
            state.block_BW[:, 1 : 1 + drafted] = self.draft(states, nodes_B, last_B=last_B, count=drafted)
        state.block_BW[:, 0] = last_B
        state.positions_B.add_(emitted.counts_B)
        state.made_B.add_(emitted.counts_B)
        state.rooms_B.sub_(emitted.counts_B).masked_fill_(emitted.finished_B, 0)
        # What a graph computed belongs to its pool; nobody reads it after the step.
        self._known = self._ahead = None

    def _emit(self, block_BM: Tensor, target_BM: Tensor) -> Emitted:
        return emit_chain(block_BM, target_BM, rooms_B=self._state.rooms_B, ends_V=self._state.ends_V)


def _embedding(model: LeanModel) -> Tensor:
    return cast(Tensor, model.get_input_embeddings().weight)


def _filled_up(prompts: Prompts) -> Prompts:
    """Rows up to a power of two, of one token each."""
    more = power_of_two(prompts.batch) - prompts.batch
    if not more:
        return prompts
    filler_XP = prompts.ids_BP[:1, :1].expand(more, prompts.ids_BP.shape[1])
    return Prompts(torch.cat((prompts.ids_BP, filler_XP)), [*prompts.lengths, *[1] * more])
