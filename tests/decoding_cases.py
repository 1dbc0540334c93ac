"""Batches, references and drafts for the decoding tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import headway.decoding.engine  # noqa: F401  (registers the engine)
from headway.decoding.compare import NEAR_TIE_GAP, first_difference, top_two_gap
from headway.decoding.drafting import TreeDrafter
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.loop import DecodingLoop
from tiny_models import VOCABULARY, random_tokens


@dataclass(frozen=True)
class Batch:
    """Prompts of different lengths in one rectangle."""

    input_ids: Tensor
    attention_mask: Tensor

    def rows(self) -> list[Tensor]:
        """Each prompt alone [1, T], without padding."""
        return [ids[mask.bool()][None] for ids, mask in zip(self.input_ids, self.attention_mask, strict=True)]


def ragged_batch(lengths: Sequence[int], sides: str, *, seed: int = 1, pad: int = 0) -> Batch:
    """`sides` has one letter per row: l pads that row on the left, r on the right."""
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for row, (length, side) in enumerate(zip(lengths, sides, strict=True)):
        place = slice(-length, None) if side == "l" else slice(0, length)
        ids[row, place] = random_tokens(length, seed=seed + row)
        mask[row, place] = 1
    return Batch(ids, mask)


def base_continuation(model: Any, row_1T: Tensor, new: int, **kwargs: Any) -> list[int]:
    """What the base's own `generate` adds to a prompt without padding."""
    options = {"pad_token_id": 0, "do_sample": False} | kwargs
    out = model.base.generate(row_1T, attention_mask=torch.ones_like(row_1T), max_new_tokens=new, **options)
    return out[0, row_1T.shape[1] :].tolist()


def new_tokens(result: Any, columns: int) -> list[list[int]]:
    """New tokens of each row, without the padding after its end."""
    return [
        row[columns : columns + count].tolist()
        for row, count in zip(result.sequences, result.num_new_tokens.tolist(), strict=True)
    ]


def near_ties(model: Any, rows: Sequence[Tensor], found: list[list[int]], expected: list[list[int]]) -> int:
    """Number of rows that differ; fails where one differs by more than rounding can explain."""
    count = 0
    for row_1T, got, wanted in zip(rows, found, expected, strict=True):
        place = first_difference(got, wanted)
        if place is None:
            continue
        gap = top_two_gap(model, [*row_1T[0].tolist(), *wanted[:place]])
        assert gap < NEAR_TIE_GAP, f"new token {place} differs: {got[place:][:1]} for {wanted[place:][:1]}, gap {gap}"
        count += 1
    return count


def script_drafts(
    monkeypatch: pytest.MonkeyPatch, continuations: Sequence[Sequence[int]], *, wrong: float = 0.3, seed: int = 3
) -> None:
    """Replace the heads' drafts by the true continuation with some tokens spoilt, so that all acceptances happen."""
    generator = torch.Generator().manual_seed(seed)
    emitted = [0] * len(continuations)

    def draft(
        self: EagerExecutor, states: Any, accepted: Sequence[int], *, last_B: Tensor | None = None, count: int
    ) -> Tensor:
        for row, right in enumerate(accepted):
            emitted[row] += right + 1
        rows = [
            [*truth[at : at + count], *[0] * count][:count] for truth, at in zip(continuations, emitted, strict=True)
        ]
        draft_BK = torch.tensor(rows)
        spoilt_BK = torch.rand(draft_BK.shape, generator=generator) < wrong
        return torch.where(spoilt_BK, (draft_BK + 1) % VOCABULARY, draft_BK)

    monkeypatch.setattr(EagerExecutor, "draft", draft)
    # Lean drafts of one call would never ask.
    monkeypatch.setattr(LeanExecutor, "_at_one_call", lambda *_, **__: False)


def script_picks(
    monkeypatch: pytest.MonkeyPatch, continuations: Sequence[Sequence[int]], *, wrong: float = 0.3, seed: int = 3
) -> None:
    """Let drafts be the true continuation with some tokens spoilt, whatever the heads say, so that all acceptances happen.

    The heads still run: their caches are what the spoilt drafts make of them.
    """
    generator = torch.Generator().manual_seed(seed)
    emitted = [0] * len(continuations)

    def spoilt(offset: int) -> Tensor:
        places = [at + offset - 2 for at in emitted]
        right = torch.tensor([[*truth, *[0] * 99][at] for truth, at in zip(continuations, places, strict=True)])
        return torch.where(torch.rand(len(right), generator=generator) < wrong, (right + 1) % VOCABULARY, right)

    original = EagerExecutor.draft

    def draft(
        self: EagerExecutor, states: Any, accepted: Sequence[int], *, last_B: Tensor | None = None, count: int
    ) -> Tensor:
        for row, right in enumerate(accepted):
            emitted[row] += right + 1
        drafted_BK = original(self, states, accepted, last_B=last_B, count=count)
        if self._model.heads.autoregressive:
            return drafted_BK
        return torch.stack([spoilt(offset) for offset in range(2, count + 2)], dim=1)

    monkeypatch.setattr(EagerExecutor, "draft", draft)
    # Lean drafts of one call would never ask.
    monkeypatch.setattr(LeanExecutor, "_at_one_call", lambda *_, **__: False)
    monkeypatch.setattr(EagerExecutor, "_pick", lambda self, logits_BV, offset: spoilt(offset))


def script_candidates(
    monkeypatch: pytest.MonkeyPatch, continuations: Sequence[Sequence[int]], *, ranks: int = 3, seed: int = 3
) -> None:
    """Let the true token of every offset have a random rank among the heads' candidates, at times a rank nobody takes."""
    generator = torch.Generator().manual_seed(seed)
    places = [0] * len(continuations)
    block = TreeDrafter.block

    def drafted(self: TreeDrafter, standing: Any, last_B1: Tensor, *, depth: int) -> Any:
        places[:] = standing.made
        return block(self, standing, last_B1, depth=depth)

    def logits(self: EagerExecutor, states: Any, nodes: Sequence[int], *, count: int) -> Tensor:
        logits_KBV = torch.rand(count, len(places), VOCABULARY, generator=generator)
        for row, (truth, made) in enumerate(zip(continuations, places, strict=True)):
            for offset, token in enumerate(truth[made : made + count]):
                rank = int(torch.randint(ranks, (1,), generator=generator))
                others = logits_KBV[offset, row].sort(descending=True).values
                logits_KBV[offset, row, token] = (others[rank] + (others[rank - 1] if rank else 2)) / 2
        return logits_KBV

    monkeypatch.setattr(TreeDrafter, "block", drafted)
    monkeypatch.setattr(EagerExecutor, "draft_logits", logits)


def script_levels(
    monkeypatch: pytest.MonkeyPatch, continuations: Sequence[Sequence[int]], *, ranks: int = 3, seed: int = 3
) -> None:
    """As `script_candidates` for drafts that are made depth by depth; the heads still run."""
    generator = torch.Generator().manual_seed(seed)
    places = [0] * len(continuations)
    begin, next_block = EagerExecutor.begin_levels, DecodingLoop._next_block

    def following(self: DecodingLoop, states: Any, emissions: Any, longest: int) -> Any:
        places[:] = [self.max_new_tokens - room for room in self._rooms]
        return next_block(self, states, emissions, longest)

    def scripted(self: EagerExecutor, states: Any, nodes: Sequence[int], *, count: int) -> Any:
        levels, depth = begin(self, states, nodes, count=count), itertools.count()

        def level(tokens_BX: Tensor, parents_BX: Tensor | None) -> Tensor:
            logits_BXV, at = levels(tokens_BX, parents_BX).clone(), next(depth)
            for row, (truth, made) in enumerate(zip(continuations, places, strict=True)):
                for token in truth[made + at : made + at + 1]:
                    rank = int(torch.randint(ranks, (1,), generator=generator))
                    others_XV = logits_BXV[row].sort(descending=True).values
                    above_X = others_XV[:, rank - 1] if rank else others_XV[:, 0] + 2
                    logits_BXV[row, :, token] = (others_XV[:, rank] + above_X) / 2
            return logits_BXV

        return level

    monkeypatch.setattr(DecodingLoop, "_next_block", following)
    monkeypatch.setattr(EagerExecutor, "begin_levels", scripted)
