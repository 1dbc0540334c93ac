"""Drawing the model's own token at all positions of a block at once: the fast path of sampling.

Legend: B rows, M positions of a block, V vocabulary.

Equal to `headway.decoding.scored.ScoredChooser` with the rule `sample_and_match`, token for token: the number that decides about
a token depends on its place in the text alone (`headway.functional.sampling.KeyedDraws`), so drawing at positions that turn out
not to count changes nothing. It needs processors that read nothing but the scores they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from headway.decoding.choosing import Emission, GreedyChooser
from headway.decoding.scored import RowSeeds
from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree

_READ_SCORES_ALONE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)

NO_TOKEN = -1
"""Where nothing can be drawn."""


def reads_scores_alone(processors: Iterable[object]) -> bool:
    """Whether what each of these makes of a position's scores depends on nothing else."""
    return all(type(processor) in _READ_SCORES_ALONE for processor in processors)


def draw_rows(scores_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One token per row of scores, int64 [R]: `inverse_cdf` of their softmax; NO_TOKEN where no share is positive and finite.

    Args:
        scores_RV: processed.
        uniform_R: float64 in [0, 1).
    """
    cumulative_RV = scores_RV.double().softmax(dim=-1).cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:]
    places_R2 = torch.cat((uniform_R[:, None] * total_R1, total_R1), dim=1)
    after_R = torch.searchsorted(cumulative_RV, places_R2[:, :1].contiguous(), right=True)[:, 0]
    last_R = torch.searchsorted(cumulative_RV, total_R1.contiguous())[:, 0]
    possible_R = ((total_R1 > 0) & total_R1.isfinite())[:, 0]
    return torch.minimum(after_R, last_R).masked_fill(~possible_R, NO_TOKEN)


class DrawnChooser(GreedyChooser):
    """The model's own draws at every position, end-of-sequence ids and a length limit."""

    def __init__(
        self,
        eos_token_ids: frozenset[int],
        *,
        processors: Callable[[Tensor | None, Tensor], Tensor],
        seeds: RowSeeds,
        max_new_tokens: int,
    ) -> None:
        """Prepare the rows.

        Args:
            eos_token_ids: tokens that end a text.
            processors: transformers' list, of processors that `reads_scores_alone` allows.
            seeds: of the draws.
            max_new_tokens: the most tokens a row can get.
        """
        super().__init__(eos_token_ids)
        self._processors = processors
        self._seeds = seeds
        self._max_new_tokens = max_new_tokens

    def _targets(self, logits_BMV: Tensor, rooms: Sequence[int], tree: Tree | RowTrees | None) -> Tensor:
        batch, positions, vocabulary = logits_BMV.shape
        numbers = []
        for row, room in enumerate(rooms):
            draws = self._seeds.draws(row, self._max_new_tokens - room)
            depths = range(positions) if tree is None else tree.of_row(row).depths
            # Nodes of one depth compete for one place of the text. Of ended rows nothing is read.
            at = [draws.uniform(depth) for depth in range(1 + max(depths))] if room else [0.0] * (1 + max(depths))
            numbers += [at[depth] for depth in depths]
        scores_RV = logits_BMV.reshape(batch * positions, vocabulary).to(torch.float32, copy=True)
        scores_RV = self._processors(None, scores_RV)
        uniform_R = torch.tensor(numbers, dtype=torch.float64, device=scores_RV.device)
        return draw_rows(scores_RV, uniform_R).view(batch, positions)

    def _emit(self, target: list[int], accepted: int, room: int) -> Emission:
        emission = super()._emit(target, accepted, room)
        if NO_TOKEN in emission.tokens:
            raise ValueError("cannot draw a token: no weight is positive and finite; logits must be finite somewhere")
        return emission
