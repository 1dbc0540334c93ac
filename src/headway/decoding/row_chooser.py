"""Turning the logits of a block into tokens where every row has its own way of choosing.

Legend: B rows, G rows that are asked for, M positions of a block, V vocabulary.

Rows that take the model's most likely tokens, whatever the text, are decided together (`GreedyChooser`). Every other row has a
rule at work, as in `ScoredChooser`; one prediction of each is processed at a time, rows of the same sampling together. A
row whose own processor or criterion fails ends alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from headway.decoding.choosing import Emission, GreedyChooser
from headway.decoding.rows import Row, RowTexts
from headway.decoding.ruled_rows import row_draft, rule_emission
from headway.functional.acceptance import Draft, Rule, Walk, greedy_match
from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree


class RowChooser:
    """A `Chooser` for rows that come and go."""

    def __init__(self, texts: RowTexts, rule_of: Callable[[bool], Rule]) -> None:
        """Choose for the rows of `texts`.

        Args:
            texts: the rows and what they are.
            rule_of: the acceptance rule of rows that draw (True) and of those that do not.
        """
        self._texts = texts
        self._rules = {sampled: rule_of(sampled) for sampled in (False, True)}
        self._greedy = GreedyChooser(frozenset())

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
        """See `Chooser.choose`; a row with an error gets None."""
        rows, device = self._texts.rows, logits_BMV.device
        walking = [bool(room) and self._walks(row) for row, room in zip(rows, rooms, strict=True)]
        together = [0 if walks else room for walks, room in zip(walking, rooms, strict=True)]
        emissions: list[Emission | None] = [None] * len(rows)
        if any(together):
            emissions = self._greedy.choose(logits_BMV, block_BM, together, tree=tree)
        if any(walking):
            shape = Tree.chain(block_BM.shape[1] - 1) if tree is None else tree
            drafts: dict[int, Draft] = {}
            for number, tokens in enumerate(block_BM.tolist()):
                if walking[number]:
                    drafts[number] = row_draft(
                        shape,
                        number,
                        tokens,
                        room=rooms[number],
                        end_token_ids=rows[number].end_token_ids,
                        probs=None if draft_probs is None else draft_probs[number],
                        absent=frozenset() if absent is None else absent[number],
                    )
            for number, emission in self._walk(logits_BMV, drafts).items():
                emissions[number] = emission
        for number, (row, found) in enumerate(zip(rows, emissions, strict=True)):
            if found is not None:
                emissions[number] = self._cut(row, found, device)
        return emissions

    def _walks(self, row: Row) -> bool:
        request = row.request
        return request.sampled or bool(request.logits_processors) or self._rules[False] is not greedy_match

    def _cut(self, row: Row, emission: Emission, device: torch.device) -> Emission | None:
        """What is left of a row's tokens when its ends are asked; the row is told."""
        try:
            count = row.stop_after(emission.tokens, device=device)
        except Exception as error:
            row.error = error
            return None
        if count is not None:
            emission = emission.ending_after(count)
        row.commit(emission.tokens)
        return emission

    def _walk(self, logits_BMV: Tensor, drafts: Mapping[int, Draft]) -> dict[int, Emission]:
        """Let each row's rule ask for predictions until it knows."""
        texts, rows = self._texts, self._texts.rows
        walks: dict[int, Walk] = {}
        wanted: dict[int, int] = {}
        emissions: dict[int, Emission] = {}
        for number, draft in drafts.items():
            row = rows[number]
            walks[number] = self._rules[row.request.sampled](draft, texts.draws(number, len(row.new)))
            wanted[number] = next(walks[number])
        while wanted:
            asked, nodes = list(wanted), list(wanted.values())
            for number, node in wanted.items():
                rows[number].propose([drafts[number].tokens[above] for above in drafts[number].tree.path(node)])
            # Indexing copies, so processors may write.
            scores_GV = texts.processed(asked, logits_BMV[asked, nodes])
            probs_GV = scores_GV.double().softmax(dim=-1) if any(rows[row].request.sampled for row in asked) else None
            for place, number in enumerate(asked):
                row = rows[number]
                try:
                    if row.error is not None:
                        raise row.error
                    target_GV = probs_GV if probs_GV is not None and row.request.sampled else scores_GV
                    wanted[number] = walks[number].send(target_GV[place])
                except StopIteration as stop:
                    emissions[number] = rule_emission(drafts[number], stop.value)
                    del wanted[number]
                except Exception as error:
                    row.error = error
                    del wanted[number]
        return emissions
