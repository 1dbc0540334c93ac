"""How often each path of candidates is the model's own text, and the trees that follow.

Legend: S starts of drafts, K heads, R ranks per head.

A start is a position from which a draft is made. The model's own tokens behind it have ranks among the heads' candidates:
r_2 for offset 2, r_3 for offset 3, and so on. A tree's node, the path (r_2, ..., r_k), is accepted exactly where the ranks
begin like that, so the expected accepted length of a tree is the sum, over its nodes, of the frequency of their paths.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.functional.tree import Tree

SMOOTHING = 16.0
"""Starts that the pooled accuracies count as, beside those that really came by a path."""

Path = tuple[int, ...]


@dataclass(frozen=True)
class Growth:
    """Paths in the order in which a tree takes them: the best tree of m drafted tokens is the first m.

    Attributes:
        paths: ranks from the root.
        values: of the paths, the chance that each is accepted; never rising.
    """

    paths: tuple[Path, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        """Drafted tokens of the largest tree."""
        return len(self.paths)

    def tree(self, nodes: int) -> Tree:
        """The best tree of so many drafted tokens."""
        return Tree.from_choices(self.paths[:nodes])

    def expected(self, nodes: int) -> float:
        """Tokens per forward of that tree, the model's own token included."""
        return 1.0 + sum(self.values[:nodes])


class PathValues:
    """The chance of every path, from ranks that were seen.

    The chance of a rank after a path is its share among the starts that came by that path, drawn towards its share among
    the starts that came by any path as if `smoothing` of them had come by this one: with 0 the paths' own frequencies, with
    infinity the product of accuracies per offset and rank, which Medusa's trees are made of.

    Attributes:
        accuracy: [K, R], per offset and rank: how often the head's candidate of that rank is the model's token, among the
            starts at which the tokens of all earlier offsets were among the R candidates.
    """

    def __init__(self, ranks_SK: Tensor, *, num_ranks: int, smoothing: float = SMOOTHING) -> None:
        """Count.

        Args:
            ranks_SK: per start and offset the rank of the model's token; -1 or at least `num_ranks` where it is no candidate.
            num_ranks: R.
            smoothing: at least 0.

        Raises:
            ValueError: no start, no head, or no rank.
        """
        if ranks_SK.ndim != 2 or not ranks_SK.numel() or num_ranks < 1 or smoothing < 0:
            raise ValueError(
                f"path values need starts, heads, ranks and a smoothing of at least 0: got ranks of shape "
                f"{tuple(ranks_SK.shape)}, {num_ranks} ranks, smoothing {smoothing}"
            )
        self._ranks_SK = torch.where(ranks_SK < num_ranks, ranks_SK, -1)
        self._num_ranks = num_ranks
        self._smoothing = smoothing
        rows = []
        on_S = torch.ones(ranks_SK.shape[0], dtype=torch.bool)
        for own_S in self._ranks_SK.T:
            counts_R = _counts(own_S[on_S], num_ranks)
            rows.append((counts_R / max(1, int(on_S.sum()))).tolist())
            on_S &= own_S >= 0
        self.accuracy: tuple[tuple[float, ...], ...] = tuple(map(tuple, rows))

    @property
    def num_heads(self) -> int:
        """K."""
        return self._ranks_SK.shape[1]

    def children(self, starts_S: Tensor, depth: int) -> tuple[list[float], list[Tensor]]:
        """Per rank its chance after a path, and the starts that go on with it.

        Args:
            starts_S: numbers of the starts that came by the path.
            depth: of the path; the ranks are those of offset depth + 2.
        """
        own_S = self._ranks_SK[starts_S, depth]
        pooled_R = torch.tensor(self.accuracy[depth], dtype=torch.float64)
        weight = float(len(starts_S))
        if self._smoothing == float("inf") or weight + self._smoothing == 0:
            chances_R = pooled_R
        else:
            chances_R = (_counts(own_S, self._num_ranks) + self._smoothing * pooled_R) / (weight + self._smoothing)
        return chances_R.tolist(), [starts_S[own_S == rank] for rank in range(self._num_ranks)]

    def value(self, path: Path) -> float:
        """The chance that a path is accepted."""
        starts_S, chance = torch.arange(self._ranks_SK.shape[0]), 1.0
        for depth, rank in enumerate(path):
            chances, groups = self.children(starts_S, depth)
            chance, starts_S = chance * chances[rank], groups[rank]
        return chance

    def grow(self, *, nodes: int, depth: int) -> Growth:
        """The best trees of 1, 2, ..., `nodes` drafted tokens, none deeper than `depth`.

        A path's chance is at most that of its beginning. So the `nodes` likeliest of all paths hold with each path its
        beginnings (ties go to the shorter path): they are a tree, and no other set of so many paths, hence no other tree,
        has a larger sum. Taking the likeliest path next, again and again, finds them, and all smaller optima on the way.

        >>> PathValues(torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0]]), num_ranks=2, smoothing=0).grow(nodes=3, depth=2)
        Growth(paths=((0,), (0, 0), (1,)), values=(0.75, 0.5, 0.25))
        """
        chosen = list(self._in_order(nodes, min(depth, self.num_heads)))
        return Growth(tuple(path for path, _ in chosen), tuple(value for _, value in chosen))

    def _in_order(self, nodes: int, depth: int) -> Iterator[tuple[Path, float]]:
        # The heap never compares tensors: paths differ.
        heap: list[tuple[float, int, Path, Tensor]] = []

        def push(path: Path, value: float, starts_S: Tensor) -> None:
            chances, groups = self.children(starts_S, len(path))
            for rank, (chance, group_S) in enumerate(zip(chances, groups, strict=True)):
                if value * chance > 0:
                    heapq.heappush(heap, (-value * chance, len(path) + 1, (*path, rank), group_S))

        push((), 1.0, torch.arange(self._ranks_SK.shape[0]))
        for _ in range(nodes):
            if not heap:
                return
            negative, length, path, starts_S = heapq.heappop(heap)
            yield path, -negative
            if length < depth:
                push(path, -negative, starts_S)


def _counts(ranks_S: Tensor, num_ranks: int) -> Tensor:
    return torch.bincount(ranks_S[ranks_S >= 0], minlength=num_ranks)[:num_ranks].double()
