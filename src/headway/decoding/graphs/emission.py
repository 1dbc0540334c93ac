"""What each row gets from one forward, decided on the device: the tensor form of the greedy chooser.

Legend: B rows, M positions of a block (the last known token and the draft), K drafted tokens, V vocabulary.

Nothing here waits for the device or has a shape that depends on what is in a tensor, so it can be part of a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headway.functional.acceptance import accept_greedy_chain


@dataclass(frozen=True)
class Emitted:
    """What a block gives.

    Attributes:
        counts_B: tokens that a row emits, `target_BM[row, :count]`; 0 for a row that had ended.
        accepted_B: drafts, from the front, that equal the target at their place, whatever limits say.
        finished_B: whether the row has ended now.
    """

    counts_B: Tensor
    accepted_B: Tensor
    finished_B: Tensor


def emit_chain(block_BM: Tensor, target_BM: Tensor, *, rooms_B: Tensor, ends_V: Tensor) -> Emitted:
    """Accept drafts, cut at end tokens and limits.

    Equal, row by row, to `headway.decoding.choosing.GreedyChooser` for a chain.

    >>> block, target = torch.tensor([[4, 5, 6], [4, 5, 6], [4, 9, 6]]), torch.tensor([[5, 6, 7]]).expand(3, 3)
    >>> ends = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor([6]), True)
    >>> emit_chain(block, target, rooms_B=torch.tensor([9, 1, 9]), ends_V=ends)
    Emitted(counts_B=tensor([2, 1, 1]), accepted_B=tensor([2, 2, 0]), finished_B=tensor([ True,  True, False]))

    Args:
        block_BM: the last known token of each row and its draft.
        target_BM: the model's own choice after each of these positions.
        rooms_B: tokens each row may still get; 0 for a row that has ended.
        ends_V: whether a token ends the text.
    """
    accepted_B = accept_greedy_chain(block_BM[:, 1:], target_BM)
    places_M = torch.arange(target_BM.shape[1], device=target_BM.device)
    stands_BM = places_M <= torch.minimum(accepted_B, rooms_B - 1)[:, None]
    ends_BM = ends_V[target_BM].long()
    stands_BM &= ends_BM.cumsum(dim=1) - ends_BM == 0
    counts_B = stands_BM.sum(dim=1)
    ended_B = (stands_BM & ends_BM.bool()).any(dim=1)
    return Emitted(counts_B, accepted_B, ended_B | (counts_B == rooms_B))


class Choice(Protocol):
    """The model's own token at every position of a block."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured graph of it depends on."""

    def __call__(self, logits_BMV: Tensor, uniforms_BM: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose.

        Args:
            logits_BMV: of offset 1.
            uniforms_BM: float64 numbers in [0, 1), one for each token.

        Returns:
            Tokens [B, M]; and where a choice can fail, which rows' choices have failed [B, M].
        """


class GreedyChoice:
    """Arg max."""

    key: tuple[Any, ...] = ("greedy",)

    def __call__(self, logits_BMV: Tensor, uniforms_BM: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Choice`."""
        # transformers decides on float32 scores, so a float64 model must too where the two differ.
        scores_BMV = logits_BMV.float() if logits_BMV.dtype == torch.float64 else logits_BMV
        return scores_BMV.argmax(dim=-1), None


class SampledChoice:
    """Draw from the processed distribution, each position with its own number (`headway.functional.sampling`).

    The numbers depend on seed, row and position alone, so they can be made ahead of time and a drafted token stands if it is
    the one that is drawn: sample-and-match, the same text as without drafts.
    """

    def __init__(self, processors: Sequence[Callable[[Any, Tensor], Tensor]]) -> None:
        """Keep the processors.

        Args:
            processors: functions of the scores [X, V] alone, whatever ids they are given.
        """
        self._processors = list(processors)

    @property
    def key(self) -> tuple[Any, ...]:
        """See `Choice.key`."""
        return ("sampled", *((type(item).__name__, *sorted(vars(item).items())) for item in self._processors))

    def __call__(self, logits_BMV: Tensor, uniforms_BM: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Choice`; a choice fails where no weight is positive or one is not finite."""
        scores_XV = logits_BMV.flatten(0, 1).float()
        for processor in self._processors:
            scores_XV = processor(None, scores_XV)
        cumulative_XV = scores_XV.double().softmax(dim=-1).cumsum(dim=-1)
        tokens_X, failed_X = draw(cumulative_XV, uniforms_BM.flatten())
        return tokens_X.view_as(uniforms_BM), failed_X.view_as(uniforms_BM)


def draw(cumulative_XV: Tensor, uniforms_X: Tensor) -> tuple[Tensor, Tensor]:
    """`headway.functional.sampling.inverse_cdf` of many distributions, without waiting for the device.

    >>> weights = torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]], dtype=torch.float64)
    >>> draw(weights.cumsum(-1), torch.tensor([0.25, 0.5], dtype=torch.float64))
    (tensor([2, 0]), tensor([False,  True]))

    Args:
        cumulative_XV: sums of weights up to each token.
        uniforms_X: in [0, 1).

    Returns:
        Tokens [X], and where no token can be drawn [X].
    """
    total_X1 = cumulative_XV[:, -1:].contiguous()
    after_X1 = torch.searchsorted(cumulative_XV, uniforms_X[:, None] * total_X1, right=True)
    last_X1 = torch.searchsorted(cumulative_XV, total_X1)
    failed_X1 = ~(total_X1 > 0) | ~total_X1.isfinite()
    return torch.minimum(after_X1, last_X1).masked_fill(failed_X1, 0)[:, 0], failed_X1[:, 0]
