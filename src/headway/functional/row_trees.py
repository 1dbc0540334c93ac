"""Candidate trees that differ from row to row, and those that grow with the probabilities of a draft.

Legend: B rows, R nodes of a tree, its root (the last known token) included, C candidates per expanded node, S candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from headway.functional.tree import Tree


@dataclass(frozen=True)
class RowTrees:
    """A tree per row, all of the same number of nodes, so that a block of them is a rectangle.

    Attributes:
        trees: per row its shape.
    """

    trees: tuple[Tree, ...]

    def __post_init__(self) -> None:
        sizes = sorted({len(tree) for tree in self.trees})
        if len(sizes) != 1:
            raise ValueError(f"the trees of a block have equally many nodes: got {sizes}; fill the smaller ones up")

    def __len__(self) -> int:
        """R."""
        return len(self.trees[0])

    @cached_property
    def depth(self) -> int:
        """Drafted tokens of the longest path of any row."""
        return max(tree.depth for tree in self.trees)

    @property
    def is_chain(self) -> bool:
        """Never: a chain in every row is a `Tree`."""
        return False

    def of_row(self, row: int) -> Tree:
        """The shape of one row."""
        return self.trees[row]

    def ancestors(self, device: torch.device | None = None) -> Tensor:
        """Bool [B, R, R]: per row what `Tree.ancestors` says.

        >>> trees = RowTrees((Tree.chain(2), Tree.from_choices([(0,), (1,)])))
        >>> trees.ancestors()[1].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
        """
        parents_BR = torch.tensor([tree.parents for tree in self.trees], device=device).clamp(min=0)
        # Itself and its parent; each square doubles how far up a node sees. The root is its own parent here.
        seen_BRR = torch.eye(len(self), device=device).repeat(len(self.trees), 1, 1)
        seen_BRR.scatter_(2, parents_BR[..., None], 1.0)
        for _ in range(max(0, self.depth - 1).bit_length()):
            seen_BRR = (seen_BRR @ seen_BRR).clamp(max=1.0)
        return seen_BRR > 0


def after_known(tree: Tree | RowTrees, known: Sequence[int]) -> Tree | RowTrees:
    """A tree behind known tokens of each row.

    >>> after_known(Tree.chain(1), [2, 0]).trees
    (Tree(parents=(-1, 0, 1, 2), ranks=(-1, -1, -1, 0)), Tree(parents=(-1, 0, 1, 2), ranks=(-1, 0, -1, -1)))

    Args:
        tree: of all rows or of each.
        known: per row how many known tokens come before its root; rows with fewer have fillers behind their trees.
    """
    most = max(known)
    if isinstance(tree, Tree) and min(known) == most:
        return tree.after(most)
    return RowTrees(tuple(tree.of_row(row).after(own, filler=most - own) for row, own in enumerate(known)))


@dataclass(frozen=True)
class DynamicTree:
    """How far trees grow whose shapes follow the probabilities of the draft.

    A candidate's value is the product of the draft's probabilities along its path. At every depth the `width` best
    candidates are expanded, each by its `width` most likely tokens; of all candidates the `nodes` best are kept. A value
    never rises along a path, so what is kept is a tree, and of all trees of so many nodes among the candidates it has the
    largest sum of values: were the probabilities right, the longest expected acceptance.

    Attributes:
        nodes: drafted tokens to keep.
        width: candidates that are expanded per depth, and tokens that each is expanded by.
        depth: K, drafted tokens of the longest path.

    Source: Li et al. 2024, EAGLE-2 (arXiv:2406.16858), section 4.
    """

    nodes: int
    width: int
    depth: int

    def __len__(self) -> int:
        """R at most."""
        return 1 + min(self.nodes, self.width + max(0, self.depth - 1) * self.width**2)

    @property
    def is_chain(self) -> bool:
        """Never, though a narrow one may turn out to be one: its shape is known only when it is made."""
        return False

    def truncated(self, depth: int) -> DynamicTree:
        """The same for drafts at most so deep."""
        return self if depth >= self.depth else replace(self, depth=depth)

    def with_branch(self, length: int) -> DynamicTree:
        """With room for a further chain from the root."""
        return replace(self, nodes=len(self) - 1 + length, depth=max(self.depth, length), width=max(2, self.width))


@dataclass(frozen=True)
class Candidates:
    """Tokens that a draft has considered, in order of depth; number 0 is the root, which is none of them.

    Attributes:
        tokens_BS: their tokens.
        scores_BS: logarithms of their values: sums of log probabilities, never above the parent's.
        parents_BS: numbers of their parents, 1 for the first candidate.
        ranks_S: which of its parent's continuations each is.
    """

    tokens_BS: Tensor
    scores_BS: Tensor
    parents_BS: Tensor
    ranks_S: Tensor

    def best(self, nodes: int) -> tuple[Tensor, RowTrees]:
        """The `nodes` candidates of largest value, all there are where there are fewer.

        Returns:
            Their tokens [B, R - 1] and shapes, in order of depth.
        """
        count = min(nodes, self.scores_BS.shape[1])
        # Stable: of equal values the shallower one comes first, and with it a parent before its certain child.
        order_BS = self.scores_BS.sort(dim=1, descending=True, stable=True).indices
        chosen_BR = order_BS[:, :count].sort(dim=1).values
        numbers_BS = torch.zeros_like(torch.nn.functional.pad(self.parents_BS, (1, 0)))
        places_BR = torch.arange(1, count + 1, device=chosen_BR.device).expand_as(chosen_BR)
        numbers_BS.scatter_(1, chosen_BR + 1, places_BR)
        parents_BR = numbers_BS.gather(1, self.parents_BS.gather(1, chosen_BR))
        shapes: Sequence[Sequence[list[int]]] = torch.stack((parents_BR, self.ranks_S[chosen_BR]), dim=1).tolist()
        trees = tuple(Tree((-1, *parents), (-1, *ranks)) for parents, ranks in shapes)
        return self.tokens_BS.gather(1, chosen_BR), RowTrees(trees)
