"""The draft with the most expected tokens per second, from path values, costs, and replayed decoding.

Legend: m drafted tokens, B rows decoded together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headway.decoding.calibration.cost import CostTable
from headway.decoding.calibration.paths import Growth, PathValues
from headway.decoding.calibration.walk import RankedText, Walk, starts_of, walk_tree
from headway.functional.tree import Tree

MOST_PASSES = 4
"""Times that trees are grown for the starts of the best one so far; it settles after two."""


@dataclass(frozen=True)
class Expectation:
    """What a draft should bring on this machine.

    Attributes:
        tree: of the heads' candidates; empty for plain decoding.
        tokens_per_forward: and row, the model's own token included.
        forward_seconds: of one forward of the batch.
        tokens_per_second: of all rows together.
    """

    tree: Tree
    tokens_per_forward: float
    forward_seconds: float
    tokens_per_second: float

    @classmethod
    def of(cls, tree: Tree, tokens_per_forward: float, forward_seconds: float, *, batch: int) -> Expectation:
        """The rate follows from the others."""
        return cls(tree, tokens_per_forward, forward_seconds, batch * tokens_per_forward / forward_seconds)

    @property
    def nodes(self) -> int:
        """Drafted tokens."""
        return len(self.tree) - 1


def best_of_every_size(
    growths: Mapping[int, Growth], costs: Mapping[int, CostTable], *, batch: int = 1, branching: bool = False
) -> list[Expectation]:
    """For every m the tree with the most expected tokens per second.

    The growth of a limit of depth holds the tree of m drafted tokens with the largest expected length among all trees of
    that limit. At equal width and limit all trees cost the same, so none of the others can be faster.

    Args:
        growths: by limit of depth.
        costs: of a forward, by the same limits.
        batch: B.
        branching: leave out chains, which cost less than the tables of trees say.
    """
    found: list[Expectation] = []
    for nodes in range(1, max(map(len, growths.values()), default=0) + 1):
        candidates = [
            Expectation.of(growth.tree(nodes), growth.expected(nodes), costs[depth].seconds(nodes), batch=batch)
            for depth, growth in growths.items()
            if nodes <= len(growth)
        ]
        candidates = [one for one in candidates if not (branching and one.tree.is_chain)]
        if candidates:
            found.append(max(candidates, key=lambda one: one.tokens_per_second))
    return found


def fastest(candidates: list[Expectation]) -> Expectation:
    """The one with the most expected tokens per second; of equals the smallest.

    Raises:
        ValueError: none.
    """
    if not candidates:
        raise ValueError("there is nothing to choose from")
    return max(candidates, key=lambda one: (one.tokens_per_second, -one.nodes))


@dataclass(frozen=True)
class Lookup:
    """A copied branch beside a tree.

    Attributes:
        tokens: of the copy.
        ngram: most tokens of its match.
    """

    tokens: int
    ngram: int


def solve_trees(
    texts: Sequence[RankedText],
    costs: Mapping[int, CostTable],
    *,
    num_ranks: int,
    most_nodes: int,
    batch: int = 1,
    lookup: Lookup | None = None,
) -> dict[int, Expectation]:
    """Per size the tree with the most expected tokens per second that was found, its length replayed along the texts.

    Drafts do not begin everywhere alike: after a rejection the text is harder. So trees are grown for all positions first,
    the fastest is replayed, and trees are grown again for the positions at which its blocks began, until the fastest stays
    the same. A tree's expected length is what the replay gives, on the same texts.

    Args:
        texts: ranked.
        costs: by limit of depth; beside a copied branch they must reach to `most_nodes` + its tokens.
        num_ranks: of each head.
        most_nodes: of the largest tree.
        batch: B.
        lookup: goes beside every tree; its blocks without a copy cost what the tree alone does.

    Raises:
        ValueError: no start in any text.
    """
    found: dict[int, tuple[Expectation, Walk]] = {}
    walk: Walk | None = None
    for _ in range(MOST_PASSES):
        values = PathValues(starts_of(texts, walk), num_ranks=num_ranks)
        growths = {depth: values.grow(nodes=most_nodes, depth=depth) for depth in costs}
        before = _best(found)
        for one in best_of_every_size(growths, costs, batch=batch, branching=lookup is None):
            walked = walk_tree(
                texts, one.tree, lookup=lookup.tokens if lookup else 0, ngram=lookup.ngram if lookup else 1
            )
            seconds = one.forward_seconds
            if lookup is not None:
                table = costs[min(depth for depth in costs if depth >= one.tree.depth)]
                wide = table.seconds(one.nodes + lookup.tokens)
                seconds = walked.copied * wide + (1 - walked.copied) * seconds
            replayed = Expectation.of(one.tree, walked.tokens_per_forward, seconds, batch=batch)
            if one.nodes not in found or replayed.tokens_per_second > found[one.nodes][0].tokens_per_second:
                found[one.nodes] = replayed, walked
        best = _best(found)
        if best is None or (before is not None and best[0].tree == before[0].tree):
            break
        walk = best[1]
    return {nodes: expectation for nodes, (expectation, _) in sorted(found.items())}


def _best(found: Mapping[int, tuple[Expectation, Walk]]) -> tuple[Expectation, Walk] | None:
    if not found:
        return None
    chosen = fastest([expectation for expectation, _ in found.values()])
    return found[chosen.nodes]
