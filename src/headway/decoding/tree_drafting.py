"""Trees whose candidates depend on the path: of fixed shape, or shaped by probabilities.

Legend: B rows, X open nodes of one depth, Y nodes of the next, R nodes of a tree, C candidates per node, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.decoding.drafting import Block, Standing
from headway.decoding.executor import EagerExecutor
from headway.decoding.levels import Levels
from headway.functional.row_trees import Candidates, DynamicTree
from headway.functional.tree import Tree, TreeLevel


class PathTreeDrafter:
    """A tree of which every node has candidates of its own: the most likely tokens after the tokens of its path.

    For heads that draft in turn. All nodes of a depth that go on are scored in one call.
    """

    def __init__(self, executor: EagerExecutor, tree: Tree) -> None:
        self._executor = executor
        self._tree = tree
        self._steps: dict[tuple[int, int], list[LevelStep]] = {}

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `Drafter.block`."""
        tree = self._tree.truncated(depth)
        kind = tree.depth, last_B1.shape[0]
        steps = self._steps.get(kind)
        if steps is None:
            steps = self._steps[kind] = [LevelStep.of(level, last_B1) for level in tree.levels]
        levels = self._executor.begin_levels(standing.states, standing.nodes, count=tree.depth)
        tokens, open_BX = [last_B1], last_B1
        for step in steps:
            logits_BXV = levels(open_BX, step.parents_BX)
            best_BXC = logits_BXV.topk(step.most, dim=-1).indices.expand(-1, open_BX.shape[1], -1)
            tokens.append(best_BXC[:, step.child_of, step.child_ranks])
            open_BX = tokens[-1][:, step.next_open]
        return Block(torch.cat(tokens, dim=1), tree)


class DynamicTreeDrafter:
    """For every row the tree that its own draft probabilities make (`DynamicTree`); for all heads that draft trees."""

    def __init__(self, executor: EagerExecutor, shape: DynamicTree) -> None:
        self._executor = executor
        self._shape = shape

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `Drafter.block`."""
        shape = self._shape.truncated(depth)
        levels = self._executor.begin_levels(standing.states, standing.nodes, count=shape.depth)
        tokens_BY, trees = expand(levels, last_B1, shape).best(shape.nodes)
        return Block(torch.cat((last_B1, tokens_BY), dim=1), trees)


def expand(levels: Levels, last_B1: Tensor, shape: DynamicTree) -> Candidates:
    """All candidates of a dynamic tree."""
    open_BX, parents_BX = last_B1, torch.zeros_like(last_B1)
    number_BX, score_BX = torch.zeros_like(last_B1), torch.zeros_like(last_B1, dtype=torch.float32)
    tokens, scores, parents = [], [], []
    candidates = 0
    for depth in range(1, shape.depth + 1):
        logits_BXV = levels(open_BX, parents_BX)
        width = min(shape.width, logits_BXV.shape[-1])
        # In half precision sums of a path would be too coarse to compare.
        precise = torch.promote_types(logits_BXV.dtype, torch.float32)
        best = logits_BXV.to(precise).log_softmax(dim=-1).topk(width, dim=-1)
        scores.append((score_BX[..., None] + best.values.clamp(max=0)).flatten(1))
        tokens.append(best.indices.expand(-1, open_BX.shape[1], -1).flatten(1))
        parents.append(number_BX[..., None].expand(-1, -1, width).flatten(1))
        first, candidates = candidates + 1, candidates + scores[-1].shape[1]
        if depth == shape.depth:
            break
        score_BX, place_BX = scores[-1].topk(min(width, scores[-1].shape[1]), dim=1)
        open_BX, parents_BX = tokens[-1].gather(1, place_BX), place_BX // width
        number_BX = first + place_BX
    ranks_S = torch.arange(candidates, device=last_B1.device) % width
    return Candidates(torch.cat(tokens, dim=1), torch.cat(scores, dim=1), torch.cat(parents, dim=1), ranks_S)


@dataclass(frozen=True)
class LevelStep:
    """A `TreeLevel` as tensors.

    Attributes:
        parents_BX: see `TreeLevel.parents`; the same for all rows.
        child_of: see there.
        child_ranks: see there.
        next_open: see there.
        most: candidates that the nodes need.
    """

    parents_BX: Tensor
    child_of: Tensor
    child_ranks: Tensor
    next_open: Tensor
    most: int

    @classmethod
    def of(cls, level: TreeLevel, last_B1: Tensor) -> LevelStep:
        """On the device of `last_B1`, for as many rows."""
        device = last_B1.device
        return cls(
            torch.tensor(level.parents, device=device).expand(last_B1.shape[0], -1),
            torch.tensor(level.child_of, device=device),
            torch.tensor(level.child_ranks, device=device),
            torch.tensor(level.next_open, device=device, dtype=torch.long),
            max(level.child_ranks) + 1,
        )
