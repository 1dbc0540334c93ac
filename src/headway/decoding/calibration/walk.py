"""What a draft would have brought along a text of the model's own, block after block.

Legend: T starts of one text, in order; K heads.

Greedy decoding is a function of the text, and so is what the heads draft at each position. Knowing the rank of each of the
model's tokens among the candidates of each earlier position, one can replay decoding with any tree without running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.decoding.lookup import TextIndex
from headway.functional.tree import Tree


@dataclass(frozen=True)
class RankedText:
    """One text and where its tokens stand among the heads' candidates.

    Attributes:
        ranks_TK: of the model's tokens at offsets 2..K + 1 from each start; -1 where a token is no candidate.
        tokens: the text that the model read.
        choices: per place of the text the token that the model chooses there, having read everything before; the text
            itself where the model wrote it.
        first: number of tokens that are known where the first draft is made, the one after the start included.
    """

    ranks_TK: Tensor
    tokens: tuple[int, ...]
    choices: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Walk:
    """Decoding replayed.

    Attributes:
        tokens_per_forward: emitted per block, the model's own token included.
        starts: per text the starts at which blocks began.
        copied: share of the blocks that held a copy.
    """

    tokens_per_forward: float
    starts: tuple[tuple[int, ...], ...]
    copied: float = 0.0


def walk_tree(texts: Sequence[RankedText], tree: Tree, *, lookup: int = 0, ngram: int = 3) -> Walk:
    """Replay decoding with a tree, and a copied branch beside it.

    Args:
        texts: of the model's own.
        tree: of the heads' candidates; the empty one for none.
        lookup: tokens of the copied branch, 0 for none.
        ngram: most tokens of its match.

    Raises:
        ValueError: no start in any text.
    """
    nodes = {(): 0} | {choice: number for number, choice in enumerate(tree.choices, start=1)}
    emitted = blocks = copies = 0
    starts: list[tuple[int, ...]] = []
    for text in texts:
        ranks = text.ranks_TK.tolist()
        copy = _copies(text, lookup, ngram) if lookup else None
        own, place = [], 0
        while place < len(ranks):
            own.append(place)
            accepted = _accepted(ranks[place], nodes)
            if copy is not None:
                right, found = copy(place)
                accepted, copies = max(accepted, right), copies + found
            emitted += 1 + accepted
            blocks += 1
            place += 1 + accepted
        starts.append(tuple(own))
    if not blocks:
        raise ValueError("there is no start to walk from; pass longer texts")
    return Walk(emitted / blocks, tuple(starts), copies / blocks)


def starts_of(texts: Sequence[RankedText], walk: Walk | None = None) -> Tensor:
    """Ranks [S, K] at the starts of a walk, or at all starts."""
    if walk is None:
        return torch.cat([text.ranks_TK for text in texts])
    return torch.cat([text.ranks_TK[list(own)] for text, own in zip(texts, walk.starts, strict=True)])


def _accepted(ranks: Sequence[int], nodes: dict[tuple[int, ...], int]) -> int:
    for depth in range(len(ranks)):
        if tuple(ranks[: depth + 1]) not in nodes:
            return depth
    return len(ranks)


def _copies(text: RankedText, count: int, ngram: int) -> Callable[[int], tuple[int, bool]]:
    """A function of growing starts: right tokens of the copy there, and whether there is one."""
    index = TextIndex(text.tokens[: text.first], longest=ngram)
    known = text.first

    def at(place: int) -> tuple[int, bool]:
        nonlocal known
        index.extend(text.tokens[known : text.first + place])
        known = text.first + place
        copied = index.continuation(count)
        truth = text.choices[known : known + count]
        right = 0
        while right < min(len(copied), len(truth)) and copied[right] == truth[right]:
            right += 1
        return right, bool(copied)

    return at
