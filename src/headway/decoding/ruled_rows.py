"""Between a block and the rule that decides a row: the draft that it sees, what its verdict gives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from headway.decoding.choosing import Emission
from headway.functional.acceptance import ROOT, Draft, Verdict
from headway.functional.row_trees import RowTrees
from headway.functional.tree import Tree


def row_draft(
    tree: Tree | RowTrees,
    row: int,
    tokens: list[int],
    *,
    room: int,
    end_token_ids: frozenset[int],
    probs: Mapping[int, Tensor] | None,
    absent: frozenset[int],
) -> Draft:
    """A row's block as a rule sees it.

    Args:
        tree: of the block's positions.
        row: number in the batch.
        tokens: of the block.
        room: tokens that the row may still get.
        end_token_ids: tokens that end its text.
        probs: where drafts were drawn: node -> the distribution that its children were drawn from.
        absent: nodes that hold a filler.
    """
    tokens = [-1 if node in absent else token for node, token in enumerate(tokens)] if absent else tokens
    # Where drafts were drawn, how many count may depend on this row alone and not on whether others draft more.
    return Draft(tree.of_row(row), tokens, room if probs is None else room - 1, room, end_token_ids, probs)


def rule_emission(draft: Draft, verdict: Verdict) -> Emission:
    """What a rule's verdict gives a row, if nothing ends its text earlier."""
    nodes = verdict.nodes
    tokens = [draft.tokens[node] for node in nodes]
    if verdict.token is not None:
        tokens.append(verdict.token)
    # The draft that would have followed the last accepted one was compared with the model's own token.
    more = verdict.token is not None and bool(draft.children(nodes[-1] if nodes else ROOT))
    return Emission(tokens, len(nodes), len(tokens) == draft.room, nodes=nodes, drafted=len(nodes) + more)
