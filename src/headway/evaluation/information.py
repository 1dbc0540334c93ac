"""What a model says about the next two tokens along a text.

Legend: T tokens of a text, P positions, C candidates for the next token, V vocabulary. At position t, X is token t + 1
and Y is token t + 2, given the text up to t.

The joint distribution is the model's own: p(x) p(y|x), where p(y|x) is the next-token distribution after the text and
x, computed for every candidate x (`headway.evaluation.continuations`), and p(y) their sum over x. With all tokens as
candidates that is exact. With the k most likely ones (and the one that came) it is the distribution given that X is
among them, renormalised, so that every identity still holds; the probability left out is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from headway.errors import ConfigError, DataError
from headway.evaluation.continuations import Continuations
from headway.evaluation.json_ready import json_ready
from headway.evaluation.offset_logits import evaluation_mode, offset_logit_chunks
from headway.functional.information import (
    PairInformation,
    joint_log_probs,
    observed_pair_information,
    pair_information,
    value_deviation,
)
from headway.model.multi_token_lm import MultiTokenLM

EXACT_VOCABULARY = 1024
"""Largest vocabulary of which every token can be a candidate."""
DEFAULT_CANDIDATES = 64
"""Candidates for larger vocabularies."""

_MAX_QUERIES = 2048
_MAX_JOINT_CELLS = 2**24
_SHORTEST_CONTEXT = 8


@dataclass(frozen=True)
class PairTerms:
    """The terms of H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X) in nats, one number per position."""

    entropy_x: tuple[float, ...]
    entropy_y: tuple[float, ...]
    entropy_x_given_y: tuple[float, ...]
    entropy_y_given_x: tuple[float, ...]
    mutual_information: tuple[float, ...]

    def means(self) -> dict[str, float]:
        """Mean of every term over the positions."""
        return {field.name: _mean(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class SecondHead:
    """What head 2 believes about Y, beside what the next-token distributions say; one number per position.

    Attributes:
        reads_next_token: whether the head knows X (sequential, hydra, Markov bias). Then it is compared with p(y|x) of the
            token that came, else with the marginal p(y).
        nats: -log of the head's probability of the token that came.
        target_nats: the same of what it is compared with.
        divergence: D(target || head), nats; 0 where the head knows all that the model knows.
        agrees: whether the most likely tokens of both are the same.
    """

    reads_next_token: bool
    nats: tuple[float, ...]
    target_nats: tuple[float, ...]
    divergence: tuple[float, ...]
    agrees: tuple[bool, ...]

    def means(self) -> dict[str, float]:
        """Mean of every figure over the positions."""
        return {name: _mean(getattr(self, name)) for name in ("nats", "target_nats", "divergence", "agrees")}


@dataclass(frozen=True)
class TextInformation:
    """The analysis of a text; item i of a list belongs to position i, which looks at tokens i + 1 and i + 2.

    Attributes:
        tokens: the text.
        candidates: for X at each position; as many as the vocabulary where the result is exact.
        vocabulary_size: V.
        belief: of the model's own distribution: what it expects.
        observed: with the text as the truth: cross-entropies, whose sum H(X) + H(Y) is the loss of 2-token prediction, and
            the pointwise relative mutual information.
        value_deviation: sigma of the paper's formal choice points, with the log-probability of Y as the reward.
        left_out: probability of X outside the candidates.
        second_head: None for a model without heads.
    """

    tokens: tuple[int, ...]
    candidates: int
    vocabulary_size: int
    belief: PairTerms
    observed: PairTerms
    value_deviation: tuple[float, ...]
    left_out: tuple[float, ...]
    second_head: SecondHead | None

    @property
    def positions(self) -> int:
        """How many were analysed."""
        return len(self.left_out)

    @property
    def exact(self) -> bool:
        """Whether every token was a candidate."""
        return self.candidates >= self.vocabulary_size

    def choice_points(self, share: float) -> tuple[int, ...]:
        """The positions with the largest I(X;Y), in the order of the text: where the next token decides what follows.

        Args:
            share: of the positions, rounded up.

        Raises:
            ConfigError: share outside 0..1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of choice points must lie in 0..1: got {share}")
        information = self.belief.mutual_information
        # rounded first: 0.1 of 50 positions are 5, not a hair more
        count = math.ceil(round(share * len(information), 6))
        return tuple(sorted(sorted(range(len(information)), key=lambda index: -information[index])[:count]))

    def means(self) -> dict[str, Any]:
        """Means over the positions."""
        return {
            "belief": self.belief.means(),
            "observed": self.observed.means(),
            "value_deviation": _mean(self.value_deviation),
            "left_out": _mean(self.left_out),
            "left_out_largest": max(self.left_out),
            "second_head": None if self.second_head is None else self.second_head.means(),
        }

    def to_json(self) -> dict[str, Any]:
        """All fields and the means; infinities become None."""
        return cast(dict[str, Any], json_ready(self)) | {
            "positions": self.positions,
            "exact": self.exact,
            "means": json_ready(self.means()),
        }


def analyze_text(
    model: MultiTokenLM, text_T: Tensor, *, candidates: int | None = None, context_tokens: int = 256
) -> TextInformation:
    """Decompose what the model says about the next two tokens at every position of a text.

    The text is read in windows of `context_tokens` that overlap by half, and every position is analysed in the first
    window that gives it half a window of context (the text's beginning has less, as it must).

    Args:
        model: any multi-token model, also with n = 1.
        text_T: token ids of one document, at least 3.
        candidates: for the next token at each position; None for all of a vocabulary of up to 1024, else the 64 most likely
            ones and the one that came.
        context_tokens: length of a window, at least 8.

    Raises:
        DataError: fewer than 3 tokens.
        ConfigError: candidates outside 1..1024, or context_tokens < 8.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 5.2, appendices L.2 and L.3.
    """
    vocabulary = int(model.family.lm_head.weight.shape[0])
    if text_T.ndim != 1 or text_T.numel() < 3:
        raise DataError(f"an analysis looks two tokens ahead: got shape {tuple(text_T.shape)}; pass 3 tokens or more")
    if context_tokens < _SHORTEST_CONTEXT:
        raise ConfigError(
            f"context_tokens must be at least {_SHORTEST_CONTEXT}: got {context_tokens}; 256 is the default"
        )
    if candidates is not None and not 1 <= candidates <= EXACT_VOCABULARY:
        raise ConfigError(
            f"candidates must lie in 1..{EXACT_VOCABULARY}: got {candidates}; {DEFAULT_CANDIDATES} is usual"
        )
    count = candidates or (vocabulary if vocabulary <= EXACT_VOCABULARY else DEFAULT_CANDIDATES)
    pieces = []
    with evaluation_mode(model):
        for start, end, first, last in _windows(text_T.numel(), context_tokens):
            pieces += list(
                _window(model, text_T[start:end], range(first - start, last - start), min(count, vocabulary))
            )
    joined = {name: torch.cat([piece[name] for piece in pieces]).tolist() for name in pieces[0]}

    def terms(kind: str) -> PairTerms:
        return PairTerms(**{field.name: tuple(joined[f"{kind}.{field.name}"]) for field in fields(PairTerms)})

    head = None
    if model.num_future_tokens > 1:
        head = SecondHead(
            reads_next_token=model.heads.autoregressive,
            nats=tuple(joined["head.nats"]),
            target_nats=tuple(joined["head.target_nats"]),
            divergence=tuple(joined["head.divergence"]),
            agrees=tuple(joined["head.agrees"]),
        )
    return TextInformation(
        tokens=tuple(text_T.tolist()),
        candidates=min(count, vocabulary),
        vocabulary_size=vocabulary,
        belief=terms("belief"),
        observed=terms("observed"),
        value_deviation=tuple(joined["value_deviation"]),
        left_out=tuple(joined["left_out"]),
        second_head=head,
    )


def _windows(length: int, context: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, first, last) of each window: tokens start..end - 1 are read, positions first..last - 1 analysed."""
    first = 0
    while first < length - 2:
        start = max(0, first - context // 2)
        end = min(start + context, length)
        yield start, end, first, end - 2
        first = end - 2


def _window(model: MultiTokenLM, text_T: Tensor, positions: range, candidates: int) -> Iterator[dict[str, Tensor]]:
    offsets = min(2, model.num_future_tokens)
    log_TV = {
        chunk.offset: chunk.logits_PV.double().log_softmax(-1)
        for chunk in offset_logit_chunks(model, text_T[None], num_offsets=offsets, chunk_tokens=text_T.numel())
    }
    vocabulary = log_TV[1].shape[-1]
    together = max(1, min(_MAX_QUERIES // candidates, _MAX_JOINT_CELLS // (candidates * vocabulary), len(positions)))
    reader = Continuations(model, text_T, max_queries=together * candidates)
    for begin in range(positions.start, positions.stop, together):
        at_P = torch.arange(begin, min(begin + together, positions.stop), device=text_T.device)
        came_P, then_P = text_T[at_P + 1], text_T[at_P + 2]
        chosen_PC = _candidates(log_TV[1][at_P], came_P, candidates)
        log_x_PC = log_TV[1][at_P].gather(-1, chosen_PC)
        kept_P1 = log_x_PC.logsumexp(-1, keepdim=True)
        joint_PCV = joint_log_probs(log_x_PC - kept_P1, reader.log_probs(at_P, chosen_PC))
        row_P = (chosen_PC == came_P[:, None]).int().argmax(-1)
        figures = {
            **_terms("belief", pair_information(joint_PCV)),
            **_terms("observed", observed_pair_information(joint_PCV, row_P, then_P)),
            "value_deviation": value_deviation(joint_PCV),
            "left_out": (-torch.expm1(kept_P1[:, 0])).clamp(min=0),
        }
        if offsets == 2:
            if model.heads.autoregressive:
                row_PV = joint_PCV[torch.arange(at_P.numel(), device=at_P.device), row_P]
                target_PV = row_PV - row_PV.logsumexp(-1, keepdim=True)
            else:
                target_PV = joint_PCV.logsumexp(-2)
            figures |= _head_figures(log_TV[2][at_P], target_PV, then_P)
        yield figures


def _candidates(log_x_PV: Tensor, came_P: Tensor, count: int) -> Tensor:
    """The most likely tokens of each position; where the one that came is not among them, it replaces the last."""
    if count == log_x_PV.shape[-1]:
        return torch.arange(count, device=log_x_PV.device).expand(log_x_PV.shape[0], -1)
    chosen_PC = log_x_PV.topk(count, dim=-1).indices
    missing_P = ~(chosen_PC == came_P[:, None]).any(-1)
    chosen_PC[missing_P, -1] = came_P[missing_P]
    return chosen_PC


def _head_figures(head_PV: Tensor, target_PV: Tensor, then_P: Tensor) -> dict[str, Tensor]:
    probs_PV = target_PV.exp()
    return {
        "head.nats": -head_PV.gather(-1, then_P[:, None])[:, 0],
        "head.target_nats": -target_PV.gather(-1, then_P[:, None])[:, 0],
        "head.divergence": torch.where(probs_PV > 0, probs_PV * (target_PV - head_PV), 0.0).sum(-1),
        "head.agrees": head_PV.argmax(-1) == target_PV.argmax(-1),
    }


def _terms(kind: str, terms: PairInformation) -> dict[str, Tensor]:
    return {f"{kind}.{field.name}": getattr(terms, field.name) for field in fields(terms)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
