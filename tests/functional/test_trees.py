"""Candidate trees: paths, ancestors, and the tree with the largest expected accepted length."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headway.functional.tree import Tree, default_tree, grow_tree

CHOICES = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]


def test_a_tree_is_its_choices_in_whatever_order_they_come():
    tree = Tree.from_choices(CHOICES[::-1])
    assert tree.choices == tuple(CHOICES)
    assert tree == Tree.from_choices(tree.choices)
    assert [tree.depths[node] for node in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert tree.children[1] == (4, 5)
    assert tree.path(7) == (1, 4, 7)


def test_a_chain_is_a_tree_without_siblings():
    assert Tree.chain(3) == Tree.from_choices([(0,), (0, 0), (0, 0, 0)])
    assert Tree.chain(3).is_chain
    assert Tree.chain(0).is_chain
    assert not Tree.from_choices(CHOICES).is_chain
    assert torch.equal(Tree.chain(3).ancestors(), torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(0,), (0,)], "twice"),
        ([(1, 0)], r"not \(1,\), where it begins"),
        ([()], "one rank or more"),
        ([(-1,)], "at least 0"),
    ],
)
def test_what_is_no_tree_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        Tree.from_choices(choices)


def test_the_nodes_of_a_smaller_depth_come_first():
    tree = Tree.from_choices(CHOICES).with_branch(4)
    for depth in range(5):
        smaller = tree.truncated(depth)
        assert smaller.parents == tree.parents[: len(smaller)]
        assert smaller.depth == depth
    assert tree.truncated(9) is tree


def test_a_branch_is_one_more_path_from_the_root():
    tree = Tree.chain(2).with_branch(3)
    paths = {tree.path(node) for node in range(1, len(tree)) if not tree.children[node]}
    assert sorted(map(len, paths)) == [2, 3]
    branch = max(paths, key=len)
    assert [tree.ranks[node] for node in branch] == [-1, -1, -1]
    assert [tree.ranks[node] for node in min(paths, key=len)] == [0, 0]


@pytest.mark.parametrize("nodes", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_a_grown_tree_is_the_best_of_all_trees_of_its_size(nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    accuracy = torch.rand(2, 3, generator=generator).sort(descending=True).values.tolist()
    every = [(a,) for a in range(3)] + [(a, b) for a in range(3) for b in range(3)]

    def value(choices):
        return sum(math.prod(accuracy[depth][rank] for depth, rank in enumerate(path)) for path in choices)

    best = max(
        value(choices)
        for choices in itertools.combinations(every, nodes)
        if all(len(path) == 1 or path[:1] in choices for path in choices)
    )
    assert value(grow_tree(accuracy, nodes=nodes).choices) == pytest.approx(best)


def test_a_grown_tree_ends_where_ranks_and_offsets_run_out():
    assert len(grow_tree([[0.5, 0.4], [0.5]], nodes=50)) == 1 + 2 + 2


@pytest.mark.parametrize(
    ("accuracy", "nodes", "message"),
    [([[0.5]], 0, "at least one node"), ([], 3, "0 offsets"), ([[0.2, 0.5]], 3, "offset 2 must not rise")],
)
def test_what_no_tree_can_be_grown_from_is_refused(accuracy, nodes, message):
    with pytest.raises(ValueError, match=message):
        grow_tree(accuracy, nodes=nodes)


def test_the_default_tree_has_the_size_asked_for_and_is_deeper_for_more_heads():
    assert len(default_tree(3, nodes=16)) == 17
    assert default_tree(1, nodes=4).choices == ((0,), (1,), (2,), (3,))
    assert default_tree(7, nodes=16).depth > default_tree(2, nodes=16).depth
