"""Drafts from a part of the vocabulary: heads score some rows, verification scores all.

Legend: V vocabulary, S tokens of the part.

A token outside the part is never drafted, which costs acceptance where it would have been right and nothing else: whatever
is drafted, the model's own prediction over all V tokens decides. Drawn drafts have q = 0 outside the part (unless a processor
forces other tokens), and an exact rule asks of q only that drafts were drawn from it.

Source: Zhao et al. 2025, FR-Spec (arXiv:2502.14856): the head of a draft model over its most frequent tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headway.decoding.lean.linear import FusedLinear, fastest_way
from headway.decoding.lean.model import LeanModel, weight_versions
from headway.errors import DecodingError

Product = Callable[[Tensor], Tensor]
"""Hidden states [..., D] -> logits [..., S]."""


def check_draft_vocabulary(tokens: Sequence[int], *, vocabulary: int) -> tuple[int, ...]:
    """The ids of a draft vocabulary, sorted.

    Args:
        tokens: ids.
        vocabulary: V.

    Raises:
        DecodingError: no id, an id twice, or one that is no token of the model.
    """
    try:
        ids = sorted(int(token) for token in tokens)
    except (TypeError, ValueError):
        raise DecodingError(f"draft_vocabulary must be a list of token ids: got {tokens!r}") from None
    if not ids:
        raise DecodingError("draft_vocabulary is empty; pass the ids of at least one token, or leave it out")
    if len(set(ids)) < len(ids):
        raise DecodingError("draft_vocabulary has a token twice; pass each id once")
    if ids[0] < 0 or ids[-1] >= vocabulary:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise DecodingError(f"draft_vocabulary has the id {wrong}; this model's ids are 0..{vocabulary - 1}")
    return tuple(ids)


class SlicedDrafts:
    """A model, eager or lean, whose heads score only a part of the vocabulary; everything else is the model's own.

    Logits of offsets from 2 on are those of the whole model for the tokens of the part, up to rounding, and minus infinity
    for all others, after the bias of the previous token and the family's soft-capping too.

    Attributes:
        family: of the model, with soft-capping that keeps minus infinity.
    """

    def __init__(self, run: Any, model: Any, tokens: Sequence[int]) -> None:
        """Cut the rows out, or take those that were cut before.

        Args:
            run: what the executor runs: the model itself or its `LeanModel`.
            model: the `MultiTokenLM`.
            tokens: ids as `check_draft_vocabulary` gives them.
        """
        self._run = run
        self._model = model
        self._products = _products(model, tuple(tokens), fused=isinstance(run, LeanModel))
        self._vocabulary = model.family.lm_head.weight.shape[0]
        self._tokens_S = torch.tensor(tokens, device=model.family.lm_head.weight.device)
        self.family = _Family(model.family)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def unembedding(self, offset: int) -> Product:
        """Normed hidden states [..., D] -> logits [..., V] of an offset from 2 on, without bias and soft-capping."""
        product = self._products[0 if len(self._products) == 1 else offset - 2]

        def scores(hidden: Tensor) -> Tensor:
            few = product(hidden)
            full = few.new_full((*few.shape[:-1], self._vocabulary), -torch.inf)
            return full.index_copy_(-1, self._tokens_S, few)

        return scores

    def soft_cap(self, logits: Tensor) -> Tensor:
        """The family's, which leaves minus infinity as it is."""
        return self.family.soft_cap(logits)

    def logits_before_bias(self, hidden: Tensor, *, offset: int) -> Tensor:
        """Logits of an offset from 2 on, without the bias of the previous token and soft-capping."""
        if self._model.heads.uses_final_norm:
            hidden = self._run.final_norm(hidden)
        return self.unembedding(offset)(hidden)

    def offset_logits(self, hidden: Tensor, *, offset: int, previous: Tensor | None = None) -> Tensor:
        """See `MultiTokenLM.offset_logits`; `previous` are real tokens here."""
        if offset == 1:
            whole: Tensor = self._run.offset_logits(hidden, offset=1)
            return whole
        logits = self.logits_before_bias(hidden, offset=offset)
        if self._model.heads.markov is not None:
            logits = logits + self._model.heads.markov(previous)
        return self.soft_cap(logits)


class _Family:
    """A family's parts; only its soft-capping differs: tanh would lift minus infinity."""

    def __init__(self, family: Any) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def soft_cap(self, logits: Tensor) -> Tensor:
        capped: Tensor = self._family.soft_cap(logits)
        return capped if capped is logits else capped.masked_fill(logits == -torch.inf, -torch.inf)


@dataclass(frozen=True)
class _Cut:
    """Rows that were cut out of a model's unembeddings: one product for all offsets, or one for each from 2 on."""

    tokens: tuple[int, ...]
    versions: tuple[tuple[int, int], ...]
    products: tuple[Product, ...]


# By the model and by whether the products are fused; a cut holds tensors only, so that it keeps no model alive.
_CUTS: weakref.WeakKeyDictionary[Any, dict[bool, _Cut]] = weakref.WeakKeyDictionary()


def _products(model: Any, tokens: tuple[int, ...], *, fused: bool) -> tuple[Product, ...]:
    kept = _CUTS.setdefault(model, {})
    versions = weight_versions(model)
    if fused not in kept or (kept[fused].tokens, kept[fused].versions) != (tokens, versions):
        own = model.heads.unembeddings
        linears = [model.family.lm_head] if own is None else list(own)
        parts = [_rows(linear, tokens) for linear in linears]
        kept[fused] = _Cut(tokens, versions, tuple(_fused(part) if fused else part for part in parts))
    return kept[fused].products


def _rows(linear: nn.Linear, tokens: tuple[int, ...]) -> nn.Linear:
    ids_S = torch.tensor(tokens, device=linear.weight.device)
    part = nn.Linear(linear.in_features, len(tokens), bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[ids_S], requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[ids_S], requires_grad=False)
    return part


def _fused(part: nn.Linear) -> Product:
    return FusedLinear([part], way=fastest_way(part.weight))
