"""Candidate trees: which continuations one forward verifies, without tokens.

Legend: R nodes of a tree, its root (the last known token) included; K depth, drafted tokens of the longest path.

Node 0 is the root. Parents come before their children, and nodes are in order of depth, so the nodes of depth at most d
are the first ones: a shorter draft is a beginning of a longer one. A chain is a tree in which nobody has siblings.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LARGEST_DEFAULT_RANK = 10
"""Ranks per offset that the default tree considers; Medusa's code takes the 10 best tokens of each head."""


@dataclass(frozen=True)
class TreeLevel:
    """One depth of a tree as whoever makes the next depth needs it; an open node is one that has children.

    Attributes:
        parents: per open node of this depth the place of its parent among the open nodes of the depth before; (0,) for the root.
        child_of: per node of the next depth, in order, the place of its parent among the open nodes of this one.
        child_ranks: per node of the next depth its rank.
        next_open: places of the open ones among the nodes of the next depth.
    """

    parents: tuple[int, ...]
    child_of: tuple[int, ...]
    child_ranks: tuple[int, ...]
    next_open: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """The shape of a candidate tree.

    >>> tree = Tree.from_choices([(0,), (1,), (0, 0)])
    >>> tree.parents, tree.depths, tree.ranks, tree.path(3)
    ((-1, 0, 0, 1), (0, 1, 1, 2), (-1, 0, 1, 0), (1, 3))

    Attributes:
        parents: per node the number of its parent; -1 for the root.
        ranks: per node which of its head's candidates it takes, 0 for the most likely; -1 for the root and for nodes
            whose tokens come from elsewhere (a copied text). Where heads draft at once, all nodes of a depth choose among
            the same candidates; where they draft in turn (a Markov bias, Hydra, sequential modules), a node's candidates are
            those of its head after the tokens of the node's own path, so the same rank is another token on another path.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def chain(cls, length: int) -> Tree:
        """`length` tokens one after the other, each head's most likely one."""
        return cls(tuple(range(-1, length)), (-1,) + (0,) * length)

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> Tree:
        """A tree from its paths, each a tuple of ranks from the root: Medusa's `tree_choices`.

        Args:
            choices: every node's path; the order does not matter.

        Raises:
            ValueError: a path twice, an empty path, a rank below 0, or a path whose beginning is missing.

        Source: Cai et al. 2024, Medusa (arXiv:2401.10774), section 2.1.2 and its code (`generate_medusa_buffers`).
        """
        paths = sorted((tuple(int(rank) for rank in path) for path in choices), key=lambda path: (len(path), path))
        number: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [-1]
        for path in paths:
            if not path or min(path) < 0:
                raise ValueError(f"a path of a tree is one rank or more, each at least 0: got {path}")
            if path in number:
                raise ValueError(f"the tree has the path {path} twice; leave one out")
            if path[:-1] not in number:
                raise ValueError(f"the tree has the path {path} but not {path[:-1]}, where it begins; add that one")
            number[path] = len(parents)
            parents.append(number[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    def __len__(self) -> int:
        """R."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Per node its distance from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """K."""
        return self.depths[-1]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per node its children in order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(tuple(numbers) for numbers in children)

    @cached_property
    def levels(self) -> tuple[TreeLevel, ...]:
        """Depths 0 .. K - 1 as the steps of making the tree's tokens.

        >>> Tree.from_choices([(0,), (1,), (1, 0), (1, 1)]).levels[1]
        TreeLevel(parents=(0,), child_of=(0, 0), child_ranks=(0, 1), next_open=())
        """
        by_depth = [[node for node, own in enumerate(self.depths) if own == depth] for depth in range(self.depth + 1)]
        open_nodes = [[node for node in nodes if self.children[node]] for nodes in by_depth]
        levels = []
        for depth, following in enumerate(by_depth[1:]):
            before = {node: place for place, node in enumerate(open_nodes[depth - 1])} if depth else {-1: 0}
            place = {node: index for index, node in enumerate(open_nodes[depth])}
            levels.append(
                TreeLevel(
                    parents=tuple(before[self.parents[node]] for node in open_nodes[depth]),
                    child_of=tuple(place[self.parents[node]] for node in following),
                    child_ranks=tuple(self.ranks[node] for node in following),
                    next_open=tuple(index for index, node in enumerate(following) if self.children[node]),
                )
            )
        return tuple(levels)

    @cached_property
    def is_chain(self) -> bool:
        """Whether nobody has siblings."""
        return self.parents == tuple(range(-1, len(self) - 1))

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every path, the root left out: what `from_choices` takes."""
        return tuple(tuple(self.ranks[place] for place in self.path(node)) for node in range(1, len(self)))

    def of_row(self, row: int) -> Tree:
        """The shape of one row: the same for all."""
        return self

    def path(self, node: int) -> tuple[int, ...]:
        """The nodes from below the root down to `node`."""
        nodes: list[int] = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def truncated(self, depth: int) -> Tree:
        """The nodes of depth at most `depth`."""
        if depth >= self.depth:
            return self
        count = sum(own <= depth for own in self.depths)
        return Tree(self.parents[:count], self.ranks[:count])

    def after(self, known: int, *, filler: int = 0) -> Tree:
        """The same below a chain of `known` nodes, with a chain of `filler` nodes below its last one; their ranks are -1.

        >>> Tree.from_choices([(0,), (1,)]).after(2, filler=1).parents
        (-1, 0, 1, 2, 2, 4)
        """
        size = known + len(self)
        parents = (
            *range(-1, known),
            *(parent + known for parent in self.parents[1:]),
            *range(size - 1, size - 1 + filler),
        )
        return Tree(parents, (*[-1] * known, *self.ranks, *[-1] * filler))

    def with_branch(self, length: int) -> Tree:
        """The same with a further chain from the root, whose ranks are -1 and whose nodes are last of their depth."""
        nodes: list[tuple[int, int, int]] = [  # depth, parent, rank
            (depth, parent, rank) for depth, parent, rank in zip(self.depths, self.parents, self.ranks, strict=True)
        ]
        first = len(nodes)
        nodes += [(depth, first + depth - 2 if depth > 1 else 0, -1) for depth in range(1, length + 1)]
        order = sorted(range(len(nodes)), key=lambda number: nodes[number][0])
        place = {number: index for index, number in enumerate(order)} | {-1: -1}
        return Tree(
            tuple(place[nodes[number][1]] for number in order),
            tuple(nodes[number][2] for number in order),
        )

    def ancestors(self) -> Tensor:
        """Bool [R, R]: whether the node of the column is the node of the row or above it.

        >>> Tree.from_choices([(0,), (1,), (0, 0)]).ancestors().int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 1, 0, 1]], dtype=torch.int32)
        """
        mask_RR = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask_RR[node] |= mask_RR[parent]
        return mask_RR


def grow_tree(accuracy: Sequence[Sequence[float]], *, nodes: int) -> Tree:
    """The tree of so many drafted tokens whose expected accepted length is largest.

    A node's value is the product of the accuracies along its path, the chance that it is accepted where offsets are
    independent; the expected accepted length is the sum of the values. Values never rise along a path or towards later
    siblings, so taking the best node next, again and again, is optimal.

    >>> grow_tree([[0.6, 0.2], [0.5, 0.1]], nodes=3).choices
    ((0,), (1,), (0, 0))

    Args:
        accuracy: per offset from 2 on, per rank: how often the head's candidate of that rank is the model's next token.
        nodes: drafted tokens, the root not counted; fewer where ranks and offsets run out.

    Raises:
        ValueError: fewer than one node, no offset, or accuracies that rise with the rank.

    Source: Cai et al. 2024, Medusa (arXiv:2401.10774), section 2.3.3.
    """
    if nodes < 1 or not accuracy:
        raise ValueError(
            f"a tree needs at least one node and one offset: got {nodes} nodes and {len(accuracy)} offsets"
        )
    for offset, ranks in enumerate(accuracy, start=2):
        if any(later > earlier for earlier, later in itertools.pairwise(ranks)):
            raise ValueError(f"accuracies of offset {offset} must not rise with the rank: got {list(ranks)}; sort them")
    # Ties go to the shallower, then to the more likely token, so that the tree is the same everywhere.
    open_nodes: list[tuple[float, int, tuple[int, ...], float]] = [(-accuracy[0][0], 1, (0,), 1.0)]
    chosen: list[tuple[int, ...]] = []
    while open_nodes and len(chosen) < nodes:
        negative, length, path, above = heapq.heappop(open_nodes)
        chosen.append(path)
        if path[-1] + 1 < len(accuracy[length - 1]):
            sibling = (*path[:-1], path[-1] + 1)
            heapq.heappush(open_nodes, (-above * accuracy[length - 1][sibling[-1]], length, sibling, above))
        if length < len(accuracy):
            heapq.heappush(open_nodes, (negative * accuracy[length][0], length + 1, (*path, 0), -negative))
    return Tree.from_choices(chosen)


def default_tree(num_heads: int, *, nodes: int) -> Tree:
    """A tree for heads of which nothing was measured.

    It is what `grow_tree` makes of an assumption: the most likely token of offset k is right with 0.6 x 0.85^(k - 2), and
    each further rank half as often as the one before, a quarter for the second. Measured accuracies make a better one.
    """
    accuracy = [
        [0.6 * 0.85**head * (1.0 if rank == 0 else 0.5 ** (rank + 1)) for rank in range(LARGEST_DEFAULT_RANK)]
        for head in range(num_heads)
    ]
    return grow_tree(accuracy, nodes=nodes)
