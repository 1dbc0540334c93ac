"""What the next block holds: likely or drawn tokens, candidate trees, copies.

Legend: B rows, M positions of a block, R nodes of a tree, K drafted tokens of the longest path, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headway.decoding.executor import EagerExecutor
from headway.decoding.lookup import TextIndex
from headway.functional.row_trees import RowTrees
from headway.functional.sampling import KeyedDraws, without_token
from headway.functional.tree import Tree
from headway.model.output import OffsetHiddenStates


@dataclass(frozen=True)
class Block:
    """What the next forward reads.

    Attributes:
        tokens_BM: the last known token of each row, and its draft.
        tree: of the positions, of all rows or of each; None for a chain.
        draft_probs: per row, where drafts were drawn: node -> the distribution that its children were drawn from.
        absent: per row the nodes that hold a filler; None where there is none.
    """

    tokens_BM: Tensor
    tree: Tree | RowTrees | None = None
    draft_probs: Sequence[Mapping[int, Tensor]] | None = None
    absent: Sequence[frozenset[int]] | None = None

    @property
    def depth(self) -> int:
        """Drafted tokens of the longest path."""
        return self.tokens_BM.shape[1] - 1 if self.tree is None else self.tree.depth


@dataclass(frozen=True)
class Standing:
    """Where a batch stands after a forward.

    Attributes:
        states: of the forward.
        nodes: per row the last accepted column of it.
        last: per row the token that the model has chosen after it.
        emitted: per row the tokens that the forward gave; empty for rows that had ended.
        made: per row all new tokens so far.
        live: rows that go on.
    """

    states: OffsetHiddenStates
    nodes: Sequence[int]
    last: Sequence[int]
    emitted: Sequence[Sequence[int]]
    made: Sequence[int]
    live: Sequence[int]


class Drafter(Protocol):
    """Makes the next block."""

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """The next block, of drafts at most `depth` deep; `last_B1` is `standing.last` on the device."""


class ChainDrafter:
    """The most likely token of each of the first `count` heads."""

    def __init__(self, executor: EagerExecutor, count: int) -> None:
        self._executor = executor
        self._count = count

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `Drafter.block`."""
        count = min(self._count, depth)
        draft_BK = self._executor.draft(standing.states, standing.nodes, last_B=last_B1[:, 0], count=count)
        return Block(torch.cat((last_B1, draft_BK), dim=1))


class TreeDrafter:
    """Each head's most likely tokens, as a tree: all nodes of a depth choose among the same candidates."""

    def __init__(self, executor: EagerExecutor, tree: Tree) -> None:
        self._executor = executor
        self._tree = tree

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `Drafter.block`."""
        tree = self._tree.truncated(depth)
        logits_KBV = self._executor.draft_logits(standing.states, standing.nodes, count=tree.depth)
        best_KBC = logits_KBV.topk(max(tree.ranks) + 1, dim=-1).indices
        offsets = torch.tensor(tree.depths[1:], device=best_KBC.device) - 1
        ranks = torch.tensor(tree.ranks[1:], device=best_KBC.device)
        candidates_BR = best_KBC.transpose(0, 1)[:, offsets, ranks]
        return Block(torch.cat((last_B1, candidates_BR), dim=1), tree)


class LookupDrafter:
    """Text copied from the row itself, alone or as one more branch beside another drafter's tree."""

    def __init__(self, texts: Sequence[Sequence[int]], *, count: int, longest: int, beside: Drafter | None) -> None:
        """Index the prompts.

        Args:
            texts: per row its prompt.
            count: tokens to copy.
            longest: most tokens of a match.
            beside: makes the other branches, where there are any.
        """
        self._indices = [TextIndex(text, longest=longest) for text in texts]
        self._count = count
        self._beside = beside

    def absorb(self, other: LookupDrafter) -> None:
        """Append the texts of further rows."""
        self._indices += other._indices

    def select(self, rows: Sequence[int]) -> None:
        """Keep the texts of some rows, in the order given."""
        self._indices = [self._indices[row] for row in rows]

    def follow(self, emitted: Sequence[Sequence[int]]) -> None:
        """Read what a forward gave each row after which nothing is drafted."""
        for index, tokens in zip(self._indices, emitted, strict=True):
            index.extend(tokens)

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `Drafter.block`."""
        self.follow(standing.emitted)
        copied = [
            index.continuation(min(self._count, depth)) if row in standing.live else []
            for row, index in enumerate(self._indices)
        ]
        length = max(map(len, copied))
        other = Block(last_B1) if self._beside is None else self._beside.block(standing, last_B1, depth=depth)
        if not length:
            return other
        # Fillers repeat the row's last token: any token that exists will do.
        padded = [tokens + [last] * (length - len(tokens)) for tokens, last in zip(copied, standing.last, strict=True)]
        copied_BK = torch.tensor(padded, device=last_B1.device)
        if self._beside is None:
            absent = [frozenset(range(len(tokens) + 1, length + 1)) for tokens in copied]
            return Block(torch.cat((last_B1, copied_BK), dim=1), absent=absent)
        if isinstance(other.tree, RowTrees):
            return _beside_row_trees(other.tokens_BM, other.tree, copied_BK, list(map(len, copied)))
        own = other.tree or Tree.chain(other.tokens_BM.shape[1] - 1)
        tree, branch = _with_branch(own, length)
        tokens_BR = torch.empty(len(copied), len(tree), dtype=torch.long, device=last_B1.device)
        others = [node for node in range(len(tree)) if node not in set(branch)]
        tokens_BR[:, others], tokens_BR[:, branch] = other.tokens_BM, copied_BK
        absent = [frozenset(branch[len(tokens) :]) for tokens in copied]
        return Block(tokens_BR, tree, absent=absent)


def _beside_row_trees(tokens_BR: Tensor, trees: RowTrees, copied_BK: Tensor, lengths: Sequence[int]) -> Block:
    """The trees of all rows, each with its copied text as a further branch."""
    wider, branches = zip(*(_with_branch(tree, copied_BK.shape[1]) for tree in trees.trees), strict=True)
    size = len(wider[0])
    others = [[node for node in range(size) if node not in set(branch)] for branch in branches]
    both_BR = tokens_BR.new_empty(len(wider), size)
    both_BR.scatter_(1, torch.tensor(others, device=tokens_BR.device), tokens_BR)
    both_BR.scatter_(1, torch.tensor(branches, device=tokens_BR.device), copied_BK)
    absent = [frozenset(branch[length:]) for branch, length in zip(branches, lengths, strict=True)]
    return Block(both_BR, RowTrees(tuple(wider)), absent=absent)


def _with_branch(tree: Tree, length: int) -> tuple[Tree, list[int]]:
    wider = tree.with_branch(length)
    # The branch is the last node of each of its depths.
    branch = [max(node for node, own in enumerate(wider.depths) if own == depth) for depth in range(1, length + 1)]
    return wider, branch


class DraftTexts(Protocol):
    """The texts that drafts are drawn after: `History`, or rows that come and go."""

    @property
    def max_new_tokens(self) -> int:
        """The most tokens a row can get."""

    def put(self, row: int, made: int, tokens: Sequence[int]) -> None:
        """Write drafted tokens of a row after its first `made` new ones."""

    def scores(self, logits_BV: Tensor, made: int, live: Sequence[int]) -> Tensor:
        """Processed float32 scores [B, V] after `made` new tokens, of the rows in `live`."""


class DraftSeeds(Protocol):
    """Where the draws of each row come from: `RowSeeds`, or rows that come and go."""

    def draws(self, row: int, made: int) -> KeyedDraws:
        """Draws of a row's block that begins after `made` new tokens."""


class DrawnDrafter:
    """Drafts drawn from the heads' distributions after the same processors as the model's own.

    Siblings are drawn without replacement, so that the rule can account for them; a distribution with fewer tokens than
    a node has children leaves the others absent. What is drawn at a depth depends on the text, the depth and the numbers
    of that place, not on how deep the draft will go.
    """

    def __init__(
        self,
        executor: EagerExecutor,
        tree: Tree,
        *,
        history: DraftTexts,
        seeds: DraftSeeds,
        end_token_ids: frozenset[int] | Callable[[int], frozenset[int]],
    ) -> None:
        self._executor = executor
        self._tree = tree
        self._history = history
        self._seeds = seeds
        self._end_token_ids = end_token_ids

    def _ends(self, row: int) -> frozenset[int]:
        """Tokens that end a row's text."""
        return self._end_token_ids(row) if callable(self._end_token_ids) else self._end_token_ids

    def block(self, standing: Standing, last_B1: Tensor, *, depth: int) -> Block:
        """See `Drafter.block`."""
        tree, batch = self._tree.truncated(depth), len(standing.last)
        tokens = [[last] + [-1] * (len(tree) - 1) for last in standing.last]
        probs: list[dict[int, Tensor]] = [{} for _ in range(batch)]
        levels = self._executor.begin_levels(standing.states, standing.nodes, count=tree.depth)
        for own_depth, level in enumerate(tree.levels):
            nodes = [node for node, at in enumerate(tree.depths) if at == own_depth and tree.children[node]]
            open_BX = torch.tensor([[max(row[node], 0) for node in nodes] for row in tokens], device=last_B1.device)
            parents_BX = torch.tensor(level.parents, device=last_B1.device).expand_as(open_BX)
            logits_BXV = levels(open_BX, parents_BX)
            for place, node in enumerate(nodes):
                self._expand(tree, node, logits_BXV[:, place % logits_BXV.shape[1]], standing, tokens, probs)
        absent = [frozenset(node for node, token in enumerate(row) if token < 0) for row in tokens]
        feed = [[max(token, 0) for token in row] for row in tokens]
        return Block(torch.tensor(feed, device=last_B1.device), tree, probs, absent)

    def _expand(
        self,
        tree: Tree,
        node: int,
        logits_BV: Tensor,
        standing: Standing,
        tokens: list[list[int]],
        probs: list[dict[int, Tensor]],
    ) -> None:
        """Draw the children of one node in every row."""
        path = tree.path(node)
        rows = [row for row in standing.live if node == 0 or tokens[row][node] not in {-1, *self._ends(row)}]
        ahead = {row: standing.made[row] + len(path) for row in rows}
        # After an end token, and beyond a row's last possible one, nothing is verified.
        rows = [row for row in rows if ahead[row] < self._history.max_new_tokens]
        for length in sorted({ahead[row] for row in rows}):
            group = [row for row in rows if ahead[row] == length]
            for row in group:
                self._history.put(row, standing.made[row], [tokens[row][above] for above in path])
            scores_BV = self._history.scores(logits_BV.clone(), length, group)
            for row in group:
                # Where the processors leave no token of the draft vocabulary, nothing is drawn.
                left_V = probs[row][node] = scores_BV[row].double().softmax(dim=-1).nan_to_num(0.0)
                draws = self._seeds.draws(row, standing.made[row])
                for child in tree.children[node]:
                    if not bool(left_V.sum() > 0):
                        break
                    tokens[row][child] = draws.draft(left_V, child)
                    left_V = without_token(left_V, tokens[row][child])
