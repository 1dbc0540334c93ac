"""The rows of a changing batch: each with its own text, processors, ends and randomness.

Legend: G rows that are asked for, T tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headway.decoding.requests import Request, StoppedBy, StoppingCriterion
from headway.decoding.statistics import RowForward
from headway.functional.sampling import KeyedDraws

Sampling = tuple[float, int, float, float | None]
"""Temperature, top-k, top-p, min-p."""

Warper = Callable[[Tensor, Tensor], Tensor]
"""(ids, scores [G, V]) -> scores [G, V], which does not look at the ids."""


@dataclass(eq=False)
class Row:
    """A request on its way.

    Attributes:
        id: of the request.
        request: what was asked.
        end_token_ids: tokens that end it.
        criteria: the request's own, and those of its stop strings.
        seed: of its draws.
        slots: of the cache that it can come to need.
        new: tokens so far.
        forwards: what each forward gave, the prefill first.
        stopped_by: what ended it.
        error: what went wrong with this row and with no other.
        cancelled: whether nobody waits for it any more.
    """

    id: int
    request: Request
    end_token_ids: frozenset[int]
    criteria: Sequence[StoppingCriterion]
    seed: int
    slots: int
    new: list[int] = field(default_factory=list)
    forwards: list[RowForward] = field(default_factory=list)
    stopped_by: StoppedBy | None = None
    error: Exception | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self._ids_T: Tensor | None = None
        self._pending: Sequence[int] = ()

    @property
    def length(self) -> int:
        """Tokens of the prompt and after it."""
        return len(self.request.prompt) + len(self.new)

    def propose(self, tokens: Sequence[int]) -> None:
        """Let the text go on with drafted tokens until they are replaced or stand."""
        self._pending = tokens

    def commit(self, tokens: Sequence[int]) -> None:
        """Append tokens that stand."""
        self.new += tokens
        self._pending = ()

    def text(self, *, device: torch.device, after: Sequence[int] | None = None) -> Tensor:
        """Ids [1, T] of prompt, new tokens and what is proposed (or `after` instead)."""
        if self._ids_T is None:
            # Made once, since processors ask for every token.
            prompt = torch.tensor([*self.request.prompt], dtype=torch.long, device=device)
            self._ids_T = torch.cat((prompt, prompt.new_zeros(self.request.max_new_tokens)))
            self._written = len(prompt)
        begin = len(self.request.prompt)
        fresh = [*self.new[self._written - begin :], *(self._pending if after is None else after)]
        end = min(self._written + len(fresh), len(self._ids_T))
        self._ids_T[self._written : end] = torch.tensor(fresh[: end - self._written], dtype=torch.long, device=device)
        self._written = self.length
        return self._ids_T[None, :end]

    def stop_after(self, tokens: Sequence[int], *, device: torch.device) -> int | None:
        """How many of the tokens that follow now still belong to the text, the last of which ends it; None for no end."""
        for count, token in enumerate(tokens, start=1):
            if token in self.end_token_ids:
                self.stopped_by = "end_token"
            elif self._at_stop_sequence(tokens[:count]):
                self.stopped_by = "stop_sequence"
            elif any(bool(ends(self.text(device=device, after=tokens[:count]), None)) for ends in self.criteria):
                self.stopped_by = "criterion"
            else:
                continue
            return count
        return None

    def _at_stop_sequence(self, tokens: Sequence[int]) -> bool:
        for sequence in self.request.stop_sequences:
            tail = [*self.new[-len(sequence) :], *tokens][-len(sequence) :]
            if tail == list(sequence):
                return True
        return False


class RowTexts:
    """What drawing drafts asks of `History` and `RowSeeds`, answered by rows that come and go.

    Attributes:
        rows: of the batch, in its order; changed in place.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def max_new_tokens(self) -> int:
        """The most tokens that any row can get."""
        return max(row.request.max_new_tokens for row in self.rows)

    def end_token_ids(self, row: int) -> frozenset[int]:
        """Tokens that end a row's text."""
        return self.rows[row].end_token_ids

    def draws(self, row: int, made: int) -> KeyedDraws:
        """Draws of a row's block that begins after `made` new tokens: those it would have alone."""
        return KeyedDraws(self.rows[row].seed, 0, made)

    def put(self, row: int, made: int, tokens: Sequence[int]) -> None:
        """Let a row's text go on with tokens."""
        assert made == len(self.rows[row].new)
        self.rows[row].propose(tokens)

    def scores(self, logits_BV: Tensor, made: int, live: Sequence[int]) -> Tensor:
        """Scores from which drafts of the rows in `live` are drawn; float32, the other rows' untouched."""
        scores_BV = logits_BV.float()
        index = torch.tensor(list(live), device=scores_BV.device)
        found_GV = self.processed(live, scores_BV[index])
        for place, row in enumerate(live):
            if not self.rows[row].request.sampled:
                # A row that takes its most likely tokens is best served by the most likely drafts.
                best = found_GV[place].argmax()
                found_GV[place] = torch.full_like(found_GV[place], -torch.inf).index_fill_(0, best, 0.0)
        scores_BV[index] = found_GV
        return scores_BV

    def processed(self, asked: Sequence[int], logits_GV: Tensor) -> Tensor:
        """Float32 scores after the processors of each row asked for; a row whose processors fail keeps its error.

        Args:
            asked: rows of the batch.
            logits_GV: of each row asked for, after the text that it proposes; may be written into.
        """
        scores_GV = logits_GV.float()
        groups: dict[Sampling, list[int]] = {}
        for place, number in enumerate(asked):
            row = self.rows[number]
            if row.request.logits_processors and row.error is None:
                try:
                    scores_1V = scores_GV[place : place + 1].clone()
                    ids_1T = row.text(device=scores_GV.device)
                    for processor in row.request.logits_processors:
                        scores_1V = processor(ids_1T, scores_1V)
                    scores_GV[place] = scores_1V[0]
                except Exception as error:
                    row.error = error
            if row.request.sampled:
                request = row.request
                groups.setdefault((request.temperature, request.top_k, request.top_p, request.min_p), []).append(place)
        for sampling, places in groups.items():
            warpers = sampling_warpers(*sampling)
            if not warpers:
                continue
            # They look at scores alone, row by row, so rows that ask for the same are served together.
            index = torch.tensor(places, device=scores_GV.device)
            part_GV = scores_GV[index]
            for warper in warpers:
                part_GV = warper(index[:, None], part_GV)
            scores_GV[index] = part_GV
        return scores_GV


@lru_cache(maxsize=256)
def sampling_warpers(temperature: float, top_k: int, top_p: float, min_p: float | None) -> tuple[Warper, ...]:
    """Transformers' warpers in the order in which its `generate` applies them.

    >>> [type(warper).__name__ for warper in sampling_warpers(0.7, 0, 0.9, None)]
    ['TemperatureLogitsWarper', 'TopPLogitsWarper']
    """
    warpers: list[Warper] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k=top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p=min_p))
    return tuple(warpers)
