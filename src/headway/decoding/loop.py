"""The decoding loop: prefill, then one forward per block until every row has ended.

Legend: B rows, M positions of a block, K drafted tokens of the longest path, N future tokens.

A block is the last known token of each row and the draft after it, a chain or a tree of candidates. One forward of base
and heads over the block gives the model's own choice after each of its positions, hence how much of the draft stands,
and, at the last position that stands, the heads' proposals for the next block (Gloeckle et al. 2024, section 3.2; Stern
et al. 2018, section 4: the merged verify and predict steps). Plain decoding is the same loop with K = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.decoding.choosing import Chooser, Emission
from headway.decoding.controller import DraftController, RowStep
from headway.decoding.drafting import Block, Drafter, LookupDrafter, Standing
from headway.decoding.executor import EagerExecutor
from headway.decoding.prompts import Prompts
from headway.decoding.scored import Recorder
from headway.decoding.statistics import DecodingMode, GenerationResult, RowForward, acceptance_statistics
from headway.decoding.trial import Trial
from headway.model.output import OffsetHiddenStates


@dataclass
class DecodingLoop:
    """One batch on its way from prompts to a result.

    All bookkeeping is on the host, in integers per row: the device is waited for once per block, for the tokens.

    Attributes:
        executor: runs the model.
        chooser: turns logits into tokens.
        prompts: the batch.
        given_BT: the prompts as the caller passed them, padding kept.
        num_future_tokens: N of the model, for the statistics.
        drafter: makes blocks; None where num_draft_tokens is 0.
        num_draft_tokens: K.
        num_heads: heads that draft.
        max_new_tokens: the most tokens a row can get, at least 1.
        pad_token_id: what fills a row after its end.
        streamer: gets the tokens of row 0 one by one, as transformers' streamers do; None where there is none.
        note: goes into the result.
        acceptance_rule: goes into the result.
        lossless: goes into the result.
        recorder: what goes into the result as scores and logits.
        controller: shortens drafts; None where they are always as long as they can be.
        rows: per row what each forward gave, the prefill first.
        interrupted: set by Ctrl-C.
    """

    executor: EagerExecutor
    chooser: Chooser
    prompts: Prompts
    given_BT: Tensor
    num_future_tokens: int
    drafter: Drafter | None
    num_draft_tokens: int
    num_heads: int
    max_new_tokens: int
    pad_token_id: int
    streamer: Any = None
    note: str | None = None
    acceptance_rule: str = "exact"
    lossless: bool = True
    recorder: Recorder | None = None
    controller: DraftController | None = None
    rows: list[list[RowForward]] = field(init=False)
    interrupted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.rows = [[] for _ in self.prompts.lengths]
        self._limits = [self.max_new_tokens] * self.prompts.batch
        self._rooms = list(self._limits)
        self._positions = [length - 1 for length in self.prompts.lengths]
        self._began_together = len(set(self._positions)) == 1
        self._block: Block | None = None
        self._trial: tuple[DraftController, Trial] | None = None
        self._streamed_forwards = 0
        self._streamed_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return not any(self._rooms)

    @property
    def mode(self) -> DecodingMode:
        """Whether blocks hold drafts."""
        return "self-speculative" if self.num_draft_tokens else "plain"

    def run(self) -> None:
        """Step until every row has ended, or until Ctrl-C, after which the tokens so far stand."""
        try:
            while not self.finished:
                self.step()
        except KeyboardInterrupt:
            self.interrupted = True
        self._stream()

    def step(self) -> list[list[int]]:
        """One forward, the first being the prefill.

        Returns:
            Per row the tokens that it emitted; empty for a row that had ended before.
        """
        # Decided before anything of this forward is known: its tokens follow the model's law whatever the length.
        controller = self.controller
        longest = self.num_draft_tokens if controller is None else controller.begin(max(self._rooms))
        trial = 0 if controller is None or longest else controller.trial
        longest = longest or trial
        num_offsets = self._num_offsets(longest)
        first = self._block is None
        if self._block is None:
            block = Block(self.prompts.ids_BP[:, -1:])
            states = self.executor.prefill(num_offsets=num_offsets)
        else:
            block = self._block
            states = self._forward(block, num_offsets)
        logits_BMV = self.executor.logits(states.last_hidden_BTD)
        emissions = self.chooser.choose(
            logits_BMV,
            block.tokens_BM,
            self._rooms,
            tree=block.tree,
            draft_probs=block.draft_probs,
            absent=block.absent,
        )
        if block.tree is not None and not block.tree.is_chain:
            paths = [(emission.nodes or ()) if emission and not emission.finished else () for emission in emissions]
            self.executor.keep(paths, self._positions)
        self._commit(emissions, block)
        self._stream()
        if not self.finished:
            self._block = self._next_block(states, emissions, longest)
        if controller is not None and self._block is not None:
            if self._trial is not None:
                self._compare(block, emissions)
            self._tell(controller, emissions, block, self._block, first=first)
            if trial:
                self._try(controller, self._block)
        return [emission.tokens if emission else [] for emission in emissions]

    def _num_offsets(self, longest: int) -> int:
        if self._block is None and self.controller is not None and self.executor.heads_need_prompts:
            # Without keys and values of the prompt heads would be of little use whenever drafting begins.
            return 1 + self.num_heads
        # A forward emits at least one token per row, so heads are needed for what can follow after that.
        return 1 + min(self.num_heads, longest, max(0, max(self._rooms) - 2))

    def _forward(self, block: Block, num_offsets: int) -> OffsetHiddenStates:
        if block.tree is None or block.tree.is_chain:
            return self.executor.block(block.tokens_BM, self._positions, num_offsets=num_offsets)
        return self.executor.tree_block(block.tokens_BM, self._positions, block.tree, num_offsets=num_offsets)

    def _commit(self, emissions: list[Emission | None], block: Block) -> None:
        width = block.tokens_BM.shape[1] - 1
        for row, emission in enumerate(emissions):
            if emission is None:
                continue
            count = len(emission.tokens)
            drafted, accepted = emission.drafted, emission.accepted
            if drafted is None:
                # A filler is no draft, even one that is right by chance.
                drafted = min(width - len(block.absent[row]) if block.absent else width, count)
                accepted = min(accepted, drafted)
            # One append per row holds everything the result is made of, so that Ctrl-C cannot leave half of it behind.
            self.rows[row].append(RowForward(emission.tokens, drafted, accepted))
            self._positions[row] += count
            self._rooms[row] = 0 if emission.finished else self._rooms[row] - count

    def _tell(
        self,
        controller: DraftController,
        emissions: list[Emission | None],
        block: Block,
        following: Block,
        *,
        first: bool,
    ) -> None:
        verified, prepared = block.depth, following.depth
        steps: list[RowStep] = []
        # Plain decoding has nothing to tell but its time.
        if verified or prepared:
            last = [rows[-1] for rows, emission in zip(self.rows, emissions, strict=True) if emission is not None]
            steps = [RowStep(forward.accepted, len(forward.tokens)) for forward in last]
        controller.end(
            steps,
            verified=verified,
            # After the end nothing is drafted, which is no length to learn about.
            prepared=prepared,
            measured=not first and not self.finished,
            lag=self._lag() if verified else None,
            parted=self._parted(),
        )

    def _parted(self) -> bool:
        """Whether rows that began at one position stand at different ones, ended rows included, which keep their place."""
        return self._began_together and len(set(self._positions)) > 1

    def _lag(self) -> float:
        """Tokens by which the row that is furthest behind is behind the mean: it decides when the batch is done."""
        rooms = [room for room in self._rooms if room]
        return max(rooms) - sum(rooms) / len(rooms) if rooms else 0.0

    def _try(self, controller: DraftController, block: Block) -> None:
        """Keep a draft to be compared with what follows, and go on without it."""
        if block.depth:
            live = [row for row, room in enumerate(self._rooms) if room]
            self._trial = controller, Trial(block.tokens_BM.tolist(), block.tree, absent=block.absent, live=live)
            self._block = Block(block.tokens_BM[:, :1])

    def _compare(self, block: Block, emissions: list[Emission | None]) -> None:
        assert self._trial is not None
        controller, trial = self._trial
        if block.depth:
            # Drafting has begun again and says more.
            self._trial = None
            return
        tried, right = trial.compare([emission.tokens[0] if emission else None for emission in emissions])
        controller.compared(trial.depth, tried, right, over=trial.over)
        if trial.over:
            self._trial = None

    def _drop_trial(self) -> None:
        """The rows of the batch change: what was drafted for them is not compared."""
        if self._trial is not None:
            self._trial[0].no_trial()
            self._trial = None

    def _next_block(self, states: OffsetHiddenStates, emissions: list[Emission | None], longest: int) -> Block:
        # An ended row keeps its place in the batch; what it is fed no longer matters.
        last = [emission.tokens[-1] if emission else 0 for emission in emissions]
        last_B1 = torch.tensor(last, device=self.executor.device)[:, None]
        depth = min(longest, max(self._rooms) - 1)
        if depth == 0 or self.drafter is None:
            if isinstance(self.drafter, LookupDrafter):
                self.drafter.follow([emission.tokens if emission else [] for emission in emissions])
            return Block(last_B1)
        standing = Standing(
            states=states,
            nodes=[emission.last_node if emission and not emission.finished else 0 for emission in emissions],
            last=last,
            emitted=[emission.tokens if emission else [] for emission in emissions],
            made=[limit - room for limit, room in zip(self._limits, self._rooms, strict=True)],
            live=[row for row, room in enumerate(self._rooms) if room],
        )
        return self.drafter.block(standing, last_B1, depth=depth)

    def _stream(self) -> None:
        if self.streamer is None:
            return
        for forward in self.rows[0][self._streamed_forwards :]:
            # Counted before it is put, so that Ctrl-C inside a streamer cannot make a token appear twice.
            for token in forward.tokens[self._streamed_tokens :]:
                self._streamed_tokens += 1
                self.streamer.put(torch.tensor([token]))
            self._streamed_forwards, self._streamed_tokens = self._streamed_forwards + 1, 0

    def new_tokens(self, row: int) -> list[int]:
        """All tokens that a row has been given so far."""
        return [token for forward in self.rows[row] for token in forward.tokens]

    def result(self) -> GenerationResult:
        """What has been generated so far, in the caller's shape."""
        given_BT = self.given_BT.long()
        new = [self.new_tokens(row) for row in range(self.prompts.batch)]
        longest = max(len(tokens) for tokens in new)
        padded = [tokens + [self.pad_token_id] * (longest - len(tokens)) for tokens in new]
        new_BT = torch.tensor(padded, dtype=torch.long, device=given_BT.device).reshape(len(new), longest)
        lengths = [len(tokens) for tokens in new]
        record = self.recorder
        return GenerationResult(
            sequences=torch.cat((given_BT, new_BT), dim=1),
            acceptance=acceptance_statistics(
                [row[1:] for row in self.rows],
                num_future_tokens=max(self.num_future_tokens, self.num_draft_tokens + 1),
                interrupted=self.interrupted,
            ),
            mode=self.mode,
            note=self.note,
            acceptance_rule=self.acceptance_rule,
            lossless=self.lossless,
            num_new_tokens=torch.tensor(lengths, dtype=torch.long),
            scores=record.steps(record.scores, lengths) if record and record.with_scores else None,
            logits=record.steps(record.logits, lengths) if record and record.with_logits else None,
            control=None if self.controller is None else self.controller.report(),
        )
