"""Two blocks as one, where rows with different drafts are to be verified by one forward.

Legend: B rows, R nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.decoding.drafting import Block
from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree


def join_blocks(first: Block, second: Block) -> Block:
    """The rows of both, each with its own draft; nodes that the other's rows brought along hold fillers.

    Args:
        first: of some rows.
        second: of others, on the same device.
    """
    shapes = [block.tree or Tree.chain(block.tokens_BM.shape[1] - 1) for block in (first, second)]
    joined: Tree | RowTrees
    where: Sequence[Sequence[int]]
    if isinstance(shapes[0], Tree) and isinstance(shapes[1], Tree):
        joined, *places = join_trees(shapes[0], shapes[1])
        where = [place for place, block in zip(places, (first, second), strict=True) for _ in block.tokens_BM]
    else:
        own = [
            shape.of_row(row)
            for shape, block in zip(shapes, (first, second), strict=True)
            for row in range(len(block.tokens_BM))
        ]
        trees, where = zip(*(filled_up(tree, max(map(len, own))) for tree in own), strict=True)
        joined = RowTrees(trees)
    absent: list[frozenset[int]] = []
    tokens: list[Tensor] = []
    probs: list[dict[int, Tensor]] = []
    for block in (first, second):
        for row, tokens_M in enumerate(block.tokens_BM):
            place = where[len(tokens)]
            # Any token that exists will do.
            tokens_R = tokens_M[:1].repeat(len(joined))
            tokens_R[place] = tokens_M
            tokens.append(tokens_R)
            lacking = frozenset(range(len(joined))) - frozenset(place)
            own_absent = frozenset[int]() if block.absent is None else block.absent[row]
            absent.append(lacking | {place[node] for node in own_absent})
            drawn = {} if block.draft_probs is None else block.draft_probs[row]
            probs.append({place[node]: probs_V for node, probs_V in drawn.items()})
    sampled = first.draft_probs is not None or second.draft_probs is not None
    return Block(
        torch.stack(tokens),
        None if first.tree is None and second.tree is None else joined,
        probs if sampled else None,
        absent if any(absent) else None,
    )


def filled_up(tree: Tree, nodes: int) -> tuple[Tree, list[int]]:
    """A tree with further children of its root, so many nodes in all, and where its own nodes are in it.

    >>> filled_up(Tree.chain(2), 4)
    (Tree(parents=(-1, 0, 0, 1), ranks=(-1, 0, -1, 0)), [0, 1, 3])
    """
    fillers = nodes - len(tree)
    first = sum(depth <= 1 for depth in tree.depths)
    place = [node if node < first else node + fillers for node in range(len(tree))]
    parents = [place[parent] if parent >= 0 else -1 for parent in tree.parents]
    return (
        Tree(
            (*parents[:first], *[0] * fillers, *parents[first:]),
            (*tree.ranks[:first], *[-1] * fillers, *tree.ranks[first:]),
        ),
        place,
    )


def join_trees(first: Tree, second: Tree) -> tuple[Tree, list[int], list[int]]:
    """The smallest tree that holds two, and where the nodes of each are in it.

    >>> join_trees(Tree.from_choices([(0,), (1,)]), Tree.from_choices([(0,), (0, 0)]))
    (Tree(parents=(-1, 0, 0, 1), ranks=(-1, 0, 1, 0)), [0, 1, 2], [0, 1, 3])
    """
    if first.parents == second.parents and first.ranks == second.ranks:
        same = list(range(len(first)))
        return first, same, same
    found: dict[tuple[int, ...], None] = {}
    own = [((), *tree.choices) for tree in (first, second)]
    for depth in range(max(first.depth, second.depth) + 1):
        for paths in own:
            found |= dict.fromkeys(path for path in paths if len(path) == depth)
    place = {path: number for number, path in enumerate(found)}
    tree = Tree(
        tuple(place[path[:-1]] if path else -1 for path in found),
        tuple(path[-1] if path else -1 for path in found),
    )
    return tree, [place[path] for path in own[0]], [place[path] for path in own[1]]


def select_rows(block: Block, rows: Sequence[int]) -> Block:
    """Some rows of a block, in the order given."""
    tree = block.tree
    if isinstance(tree, RowTrees):
        tree = RowTrees(tuple(tree.trees[row] for row in rows))
    return Block(
        block.tokens_BM[torch.tensor(list(rows), device=block.tokens_BM.device)],
        tree,
        None if block.draft_probs is None else [block.draft_probs[row] for row in rows],
        None if block.absent is None else [block.absent[row] for row in rows],
    )
