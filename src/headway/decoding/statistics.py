"""What a generation measured about itself.

Legend: B rows, N future tokens.

Counting rules: the prefill and the token it gives are not counted; neither are forwards during which a row was already
finished; neither are tokens that an end-of-sequence id, a stop string or a length limit cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from headway.decoding.controller import ControlReport

DecodingMode = Literal["self-speculative", "plain"]


class RowForward(NamedTuple):
    """What one forward did for one row.

    Attributes:
        tokens: the tokens it emitted.
        drafted: drafts that were compared with an emitted token.
        accepted: how many of them, from the front, were right.
    """

    tokens: list[int]
    drafted: int
    accepted: int


@dataclass(frozen=True, eq=False)
class AcceptanceStatistics:
    """How far each forward got.

    Attributes:
        mean_acceptance_length: tokens emitted per forward, the model's own token included, pooled over rows: 1..n; NaN
            where no forward followed the prefill.
        acceptance_rate: float64 [N-1], item i for offset i + 2: of the drafts whose earlier offsets were all right, the
            share that was right too; pooled over rows, NaN where never drafted. In a tree a draft is right where one of its
            candidates is. More than N-1 items where more tokens were copied than heads draft.
        forwards: int64 [B], forwards after the prefill in which the row was unfinished.
        emitted_tokens: int64 [B], tokens that these forwards gave (the prefill's token is not among them).
        lengths: per row, the tokens emitted by each of its forwards.
        interrupted: whether Ctrl-C ended the generation.
        drafted: per item of `acceptance_rate` the drafts that it counts.
        accepted: those of them that were right; with these, figures of several batches pool.
    """

    mean_acceptance_length: float
    acceptance_rate: Tensor
    forwards: Tensor
    emitted_tokens: Tensor
    lengths: list[list[int]]
    interrupted: bool = False
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; NaN becomes None."""
        rates = [None if math.isnan(rate) else rate for rate in self.acceptance_rate.tolist()]
        mean = self.mean_acceptance_length
        return {
            "mean_acceptance_length": None if math.isnan(mean) else mean,
            "acceptance_rate": rates,
            "forwards": self.forwards.tolist(),
            "emitted_tokens": self.emitted_tokens.tolist(),
            "lengths": self.lengths,
            "interrupted": self.interrupted,
        }


def acceptance_statistics(
    rows: Sequence[Sequence[RowForward]], *, num_future_tokens: int, interrupted: bool = False
) -> AcceptanceStatistics:
    """Pool the forwards of a batch.

    >>> rows = [[RowForward([5, 6], drafted=2, accepted=1), RowForward([7], drafted=1, accepted=0)]]
    >>> statistics = acceptance_statistics(rows, num_future_tokens=3)
    >>> statistics.mean_acceptance_length, statistics.acceptance_rate.tolist(), statistics.lengths
    (1.5, [0.5, 0.0], [[2, 1]])

    Args:
        rows: per row its forwards after the prefill.
        num_future_tokens: N.
        interrupted: whether Ctrl-C ended the generation.
    """
    drafted = [0] * (num_future_tokens - 1)
    accepted = [0] * (num_future_tokens - 1)
    for row in rows:
        for forward in row:
            for index in range(forward.drafted):
                drafted[index] += 1
            for index in range(forward.accepted):
                accepted[index] += 1
    lengths = [[len(forward.tokens) for forward in row] for row in rows]
    forwards = sum(len(row) for row in lengths)
    emitted = sum(sum(row) for row in lengths)
    return AcceptanceStatistics(
        mean_acceptance_length=emitted / forwards if forwards else math.nan,
        acceptance_rate=torch.tensor(
            [right / tried if tried else math.nan for right, tried in zip(accepted, drafted, strict=True)],
            dtype=torch.float64,
        ),
        forwards=torch.tensor([len(row) for row in lengths], dtype=torch.long),
        emitted_tokens=torch.tensor([sum(row) for row in lengths], dtype=torch.long),
        lengths=lengths,
        interrupted=interrupted,
        drafted=tuple(drafted),
        accepted=tuple(accepted),
    )


@dataclass
class GenerationResult(ModelOutput):  # type: ignore[misc]
    """What `generate(return_dict_in_generate=True)` returns; `result[0]` is `sequences`.

    Attributes:
        sequences: int64 [B, T + new], `input_ids` as given and from column T on the new tokens; after a row's end the
            padding id (the end-of-sequence id where there is none, 0 where there is neither).
        acceptance: how far each forward got.
        mode: "self-speculative", or "plain" for one token per forward.
        note: why the mode is plain although a draft was possible, or that the acceptance rule is lossy; else None.
        acceptance_rule: which drafts stood: "exact", "tokenwise", "typical", "top_k" or "distance".
        lossless: whether the rule leaves the model's output, or where it samples its distribution, as it is.
        num_new_tokens: int64 [B], new tokens of each row, without padding.
        scores: with `output_scores`, per new token the processed scores [B, V] that decided it; NaN after a row's end.
        logits: with `output_logits`, the same before processing.
        control: with `num_draft_tokens="auto"`, the lengths chosen and the costs and acceptance they were chosen for.
    """

    sequences: Tensor
    acceptance: AcceptanceStatistics = None  # type: ignore[assignment]  # ModelOutput allows one required field
    mode: DecodingMode = None  # type: ignore[assignment]
    note: str | None = None
    acceptance_rule: str = None  # type: ignore[assignment]
    lossless: bool = None  # type: ignore[assignment]
    num_new_tokens: Tensor = None  # type: ignore[assignment]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    control: ControlReport | None = None
