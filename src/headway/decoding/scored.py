"""From a block's logits to tokens, under processors, criteria and any rule.

Legend: B rows, M positions of a block, V vocabulary.

Every row has a rule at work (`headway.functional.acceptance.Walk`), which asks for the model's prediction at one node after
another. Rows that want a prediction after the same number of tokens are served by one call of the processors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headway.decoding.choosing import Emission
from headway.decoding.history import History
from headway.decoding.ruled_rows import row_draft, rule_emission
from headway.functional.acceptance import ROOT, Draft, Rule, Verdict, Walk
from headway.functional.row_trees import RowTrees
from headway.functional.sampling import KeyedDraws
from headway.functional.tree import Tree


@dataclass(frozen=True)
class RowSeeds:
    """Where the draws of each row come from.

    Attributes:
        seed: one number, of which every row has its own stream; or one number per row, of which it has the first stream.
    """

    seed: int | Sequence[int]

    def draws(self, row: int, made: int) -> KeyedDraws:
        """Draws of a row's block that begins after `made` new tokens."""
        if isinstance(self.seed, int):
            return KeyedDraws(self.seed, row, made)
        return KeyedDraws(self.seed[row], 0, made)


@dataclass
class Recorder:
    """Keeps what the model predicted for every emitted token, for `output_scores` and `output_logits`.

    Attributes:
        batch: B.
        with_scores: whether the result has scores.
        with_logits: whether it has logits.
        scores: per row the processed scores [V] of each new token.
        logits: per row the model's own.
    """

    batch: int
    with_scores: bool
    with_logits: bool
    scores: list[list[Tensor]] = field(init=False)
    logits: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = [[] for _ in range(self.batch)]
        self.logits = [[] for _ in range(self.batch)]

    def steps(self, rows: list[list[Tensor]], lengths: Sequence[int]) -> tuple[Tensor, ...]:
        """Per new token the predictions of all rows [B, V], float32; NaN for a row that had ended before."""
        if not any(lengths):
            return ()
        nothing_V = torch.full_like(next(row[0] for row in rows if row), torch.nan, dtype=torch.float32)
        return tuple(
            torch.stack(
                [row[at].float() if at < length else nothing_V for row, length in zip(rows, lengths, strict=True)]
            )
            for at in range(max(lengths))
        )


class ScoredChooser:
    """One acceptance rule for all rows, on predictions that are processed position by position."""

    def __init__(
        self,
        history: History,
        *,
        rule: Rule,
        seeds: RowSeeds | None,
        end_token_ids: frozenset[int],
        other_criteria: bool,
        recorder: Recorder | None = None,
    ) -> None:
        """Prepare the rows.

        Args:
            history: ids, processors and criteria.
            rule: which drafts stand.
            seeds: of the draws; None for temperature 0.
            end_token_ids: tokens that end a text.
            other_criteria: whether criteria other than these and the length limit have to be asked after every token.
            recorder: is told the predictions of every new token.
        """
        self._history = history
        self._rule = rule
        self._seeds = seeds
        self._ends = end_token_ids
        self._other_criteria = other_criteria
        self._recorder = recorder

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
        """See `Chooser.choose`."""
        tree = Tree.chain(block_BM.shape[1] - 1) if tree is None else tree
        drafts: dict[int, Draft] = {}
        tokens_BM: list[list[int]] = block_BM.tolist()
        for row, room in enumerate(rooms):
            if not room:
                continue
            drafts[row] = row_draft(
                tree,
                row,
                tokens_BM[row],
                room=room,
                end_token_ids=self._ends,
                probs=None if draft_probs is None else draft_probs[row],
                absent=frozenset() if absent is None else absent[row],
            )
        made = [self._history.max_new_tokens - room for room in rooms]
        verdicts = self._verdicts(logits_BMV, drafts, made)
        found = {row: rule_emission(drafts[row], verdict) for row, verdict in verdicts.items()}
        for row, emission in found.items():
            self._history.put(row, made[row], emission.tokens)
        ended = self._ended({row: emission.tokens for row, emission in found.items()}, made)
        found |= {row: found[row].ending_after(count) for row, count in ended.items()}
        return [found.get(row) for row in range(len(rooms))]

    def _verdicts(self, logits_BMV: Tensor, drafts: dict[int, Draft], made: list[int]) -> dict[int, Verdict]:
        walks: dict[int, Walk] = {}
        wanted: dict[int, int] = {}
        verdicts: dict[int, Verdict] = {}
        seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for row, draft in drafts.items():
            # Without draws the rule is one that never asks for any.
            draws = (self._seeds or RowSeeds(0)).draws(row, made[row])
            walks[row] = self._rule(draft, draws)
            wanted[row] = next(walks[row])
        rows_B = torch.arange(logits_BMV.shape[0], device=logits_BMV.device)
        while wanted:
            ahead = {row: made[row] + drafts[row].tree.depths[node] for row, node in wanted.items()}
            shortest = min(ahead.values())
            group = [row for row in wanted if ahead[row] == shortest]
            for row in group:
                path = drafts[row].tree.path(wanted[row])
                self._history.put(row, made[row], [drafts[row].tokens[node] for node in path])
            at_B = torch.tensor([wanted.get(row, ROOT) for row in range(len(rows_B))], device=rows_B.device)
            # Processors may write into the scores; indexing copies.
            logits_BV = logits_BMV[rows_B, at_B]
            scores_BV = self._history.scores(logits_BV.clone() if self._recorder else logits_BV, shortest, group)
            group_G = torch.tensor(group, device=scores_BV.device)
            targets_GV = scores_BV[group_G]
            if self._seeds is not None:
                targets_GV = targets_GV.double().softmax(dim=-1)
            for row, target_V in zip(group, targets_GV, strict=True):
                if self._recorder is not None:
                    seen[row, wanted[row]] = (scores_BV[row], logits_BV[row])
                try:
                    wanted[row] = walks[row].send(target_V)
                except StopIteration as stop:
                    verdicts[row] = stop.value
                    del wanted[row]
        if self._recorder is not None:
            for row, verdict in verdicts.items():
                after = (ROOT, *verdict.nodes)[: len(verdict.nodes) + (verdict.token is not None)]
                self._recorder.scores[row] += [seen[row, node][0] for node in after]
                self._recorder.logits[row] += [seen[row, node][1] for node in after]
        return verdicts

    def _ended(self, texts: dict[int, list[int]], made: list[int]) -> dict[int, int]:
        """Rows that end within their new tokens -> how many of those stand."""
        ended: dict[int, int] = {}
        if not self._other_criteria:
            for row, tokens in texts.items():
                if not self._ends.isdisjoint(tokens):
                    ended[row] = next(place for place, token in enumerate(tokens, start=1) if token in self._ends)
            return ended
        lengths = sorted({made[row] + place for row, tokens in texts.items() for place in range(1, len(tokens) + 1)})
        for length in lengths:
            group = [row for row in texts if row not in ended and made[row] < length <= made[row] + len(texts[row])]
            if group:
                stops = self._history.ended(length)
                ended |= {row: length - made[row] for row in group if stops[row]}
        return ended
