"""Whether two generations are the same text, and if not, how near the choice was where they part.

Legend: B rows, T positions, V vocabulary.

Float32 sums depend on how many positions a matrix product has, so where the model's two best tokens are almost equally
likely, one position at a time and a block at a time may choose differently without either being wrong. The logit gap at
the first difference tells such a near-tie from an error; `explain_differences` says more about it, in any precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.loop import DecodingLoop
from headway.decoding.near_tie import NEAR_TIE_GAP, Difference, differences, first_difference
from headway.decoding.refusals import resolve_option
from headway.decoding.scored import RowSeeds
from headway.decoding.statistics import GenerationResult
from headway.errors import DecodingError

__all__ = [
    "NEAR_TIE_GAP",
    "GreedyComparison",
    "compare_greedy",
    "explain_differences",
    "first_difference",
    "top_two_gap",
]


@dataclass(frozen=True)
class GreedyComparison:
    """Two greedy generations of one batch side by side.

    Attributes:
        first_difference: per row, index of the first new token that differs, None where the rows are the same.
        logit_gap: per row, the gap between the two largest logits after the common prefix, None where there is no
            difference.
        self_speculative: the generation with drafts.
        plain: the generation with one token per forward.
    """

    first_difference: tuple[int | None, ...]
    logit_gap: tuple[float | None, ...]
    self_speculative: GenerationResult
    plain: GenerationResult

    @property
    def identical(self) -> bool:
        """Whether not one token differs."""
        return all(place is None for place in self.first_difference)

    @property
    def near_ties(self) -> int:
        """Rows that part where the two best tokens are within `NEAR_TIE_GAP`."""
        return sum(gap is not None and gap < NEAR_TIE_GAP for gap in self.logit_gap)

    @property
    def identical_but_for_near_ties(self) -> bool:
        """Whether every difference is a near-tie."""
        return all(gap is None or gap < NEAR_TIE_GAP for gap in self.logit_gap)


def compare_greedy(
    model: Any, input_ids: Tensor, *, num_draft_tokens: int | None = None, **kwargs: Any
) -> GreedyComparison:
    """Decode a batch with drafts and plainly, with the same engine and weights, and compare the new tokens.

    Args:
        model: a `MultiTokenLM`.
        input_ids: prompts [B, T].
        num_draft_tokens: of the generation with drafts; None for n - 1.
        kwargs: as in `generate`: attention_mask, max_new_tokens, eos_token_id, processors, ...

    Raises:
        DecodingError: sampling was asked for, or a request that the engine does not serve.
    """
    if resolve_option("do_sample", kwargs, model):
        raise DecodingError("a comparison of greedy generations cannot sample; leave do_sample out")
    drafted, plain = (_run(model, input_ids, num_draft_tokens=drafts, **kwargs) for drafts in (num_draft_tokens, 0))
    places: list[int | None] = []
    gaps: list[float | None] = []
    for row, length in enumerate(plain.prompts.lengths):
        reference = plain.new_tokens(row)
        place = first_difference(drafted.new_tokens(row), reference)
        common = [*plain.prompts.ids_BP[row, :length].tolist(), *reference[:place]]
        places.append(place)
        gaps.append(None if place is None else top_two_gap(model, common))
    return GreedyComparison(tuple(places), tuple(gaps), self_speculative=drafted.result(), plain=plain.result())


def _run(model: Any, input_ids: Tensor, **kwargs: Any) -> DecodingLoop:
    loop = ENGINE.start(model, input_ids, **kwargs)
    with decoding_context(model):
        loop.run()
    if loop.interrupted:
        # Half a generation would count as a difference.
        raise KeyboardInterrupt
    return loop


def explain_differences(
    model: Any, input_ids: Tensor, *, num_draft_tokens: int | str | None = None, **kwargs: Any
) -> list[Difference]:
    """Decode a batch with drafts and plainly once more, and report where and why rows part.

    Both generations keep what the model said about every token, which costs memory and time: for texts that were found to
    differ. Under `num_draft_tokens="auto"` a repetition may choose other lengths, and then shows other differences or none.

    Args:
        model: a `MultiTokenLM`.
        input_ids: prompts [B, T].
        num_draft_tokens: of the generation with drafts; None for n - 1.
        kwargs: as in `generate`. Sampling needs a `seed`, so that both ways draw the same numbers.

    Returns:
        One report for each row that differs.

    Raises:
        DecodingError: sampling without a seed, drawn drafts, or a request that the engine does not serve.
    """
    uniform: Callable[[int, int], float] | None = None
    if resolve_option("do_sample", kwargs, model):
        seed = kwargs.get("seed")
        if seed is None or kwargs.get("sample_drafts"):
            raise DecodingError(
                "texts that were drawn can be compared where both ways draw the same numbers: pass seed=..., and leave "
                "sample_drafts out"
            )
        seeds = RowSeeds(seed)

        def uniform(row: int, place: int) -> float:
            return seeds.draws(row, 0).uniform(place)

    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, drafted = (
        ENGINE.generate(model, input_ids, num_draft_tokens=drafts, **(kwargs | kept))
        for drafts in (0, num_draft_tokens)
    )
    return differences(plain, drafted, dtype=model.get_input_embeddings().weight.dtype, uniform=uniform)


def top_two_gap(model: Any, tokens: Sequence[int]) -> float:
    """Gap between the two largest next-token logits after `tokens`, from one forward of the base without a cache."""
    ids_1T = torch.tensor([list(tokens)], device=model.get_input_embeddings().weight.device)
    with decoding_context(model):
        logits_V = model.base(input_ids=ids_1T, use_cache=False).logits[0, -1]
        best, second = logits_V.double().topk(2).values.tolist()
    return float(best - second)
