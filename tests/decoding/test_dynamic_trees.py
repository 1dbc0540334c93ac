"""Dynamic trees keep the likeliest candidates of every row, and the text is that of plain decoding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding_cases import ragged_batch, script_levels
from head_cases import head_model
from headway.decoding.cache import RaggedCache
from headway.decoding.masks import BlockMasks
from headway.decoding.tree_drafting import DynamicTreeDrafter, expand
from headway.errors import DecodingError
from headway.functional.row_trees import DynamicTree, RowTrees
from headway.functional.tree import Tree
from tiny_models import FAMILIES, random_tokens, tiny_model

NEW = 20
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")
HEADS = ["transformer", "linear-tap-markov", "hydra", "sequential"]
OPTIONS: dict[str, Any] = {"attention_mask": RAGGED.attention_mask, "max_new_tokens": NEW}


class TableLevels:
    """A draft whose distribution at every node is a function of its path, for a small vocabulary."""

    def __init__(self, batch: int, vocabulary: int, seed: int) -> None:
        self._batch, self._vocabulary, self._seed = batch, vocabulary, seed
        self._paths: list[list[tuple[int, ...]]] = []

    def logits(self, row: int, path: tuple[int, ...]) -> Tensor:
        key = hash((self._seed, row, path)) % 2**31
        return 2 * torch.randn(self._vocabulary, generator=torch.Generator().manual_seed(key), dtype=torch.float64)

    def __call__(self, tokens_BX: Tensor, parents_BX: Tensor) -> Tensor:
        before = self._paths or [[()]] * self._batch
        first = not self._paths
        self._paths = [
            [() if first else (*before[row][above], token) for token, above in zip(tokens, parents, strict=True)]
            for row, (tokens, parents) in enumerate(zip(tokens_BX.tolist(), parents_BX.tolist(), strict=True))
        ]
        return torch.stack(
            [torch.stack([self.logits(row, path) for path in paths]) for row, paths in enumerate(self._paths)]
        )


def by_hand(levels: TableLevels, row: int, shape: DynamicTree, vocabulary: int) -> dict[tuple[int, ...], float]:
    """The definition: path -> value of the nodes that are kept."""
    values: dict[tuple[int, ...], float] = {}
    expanded: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(shape.depth):
        below = {}
        for path, value in expanded.items():
            probs = levels.logits(row, path).softmax(dim=-1)
            likeliest = sorted(range(vocabulary), key=lambda token, probs=probs: -float(probs[token]))
            below |= {(*path, token): value * float(probs[token]) for token in likeliest[: shape.width]}
        values |= below
        expanded = dict(sorted(below.items(), key=lambda item: -item[1])[: shape.width])
    return dict(sorted(values.items(), key=lambda item: -item[1])[: shape.nodes])


@pytest.mark.parametrize("seed", range(6))
def test_the_kept_nodes_are_the_likeliest_of_all_that_were_considered_and_connected(seed):
    batch, vocabulary = 3, 5
    shape = DynamicTree(
        nodes=(4, 7, 11, 13, 30, 60)[seed], width=(2, 3, 3, 9, 4, 2)[seed], depth=(4, 3, 4, 2, 3, 5)[seed]
    )
    last_B1 = torch.arange(batch)[:, None]
    tokens_BY, trees = expand(TableLevels(batch, vocabulary, seed), last_B1, shape).best(shape.nodes)
    assert len(trees) <= len(shape)
    shapes = set()
    for row, tokens in enumerate(tokens_BY.tolist()):
        tree = trees.of_row(row)
        assert tree.depths == tuple(sorted(tree.depths))
        assert all(0 <= parent < node for node, parent in enumerate(tree.parents[1:], start=1))
        paths = [tuple(tokens[above - 1] for above in tree.path(node)) for node in range(1, len(tree))]
        expected = by_hand(TableLevels(batch, vocabulary, seed), row, shape, vocabulary)
        assert set(paths) == set(expected)
        for node, path in enumerate(paths, start=1):
            probs = TableLevels(batch, vocabulary, seed).logits(row, path[:-1])
            assert int(probs.argsort(descending=True)[tree.ranks[node]]) == path[-1]
        shapes.add(tree.parents)
    assert len(shapes) > 1 or seed in (3, 4)


def test_no_tree_of_as_many_nodes_has_a_larger_sum_of_values():
    shape = DynamicTree(nodes=4, width=3, depth=2)
    levels = TableLevels(1, 3, seed=8)
    every = by_hand(levels, 0, DynamicTree(nodes=99, width=3, depth=2), 3)
    kept = by_hand(levels, 0, shape, 3)
    trees = [
        paths
        for paths in itertools.combinations(every, 4)
        if all(path[:-1] in paths for path in paths if len(path) > 1)
    ]
    assert len(trees) > 20
    assert sum(kept.values()) == pytest.approx(max(sum(every[path] for path in paths) for paths in trees))


def test_a_certain_continuation_never_comes_without_what_stands_before_it():
    class Certain:
        def __call__(self, tokens_BX: Tensor, parents_BX: Tensor) -> Tensor:
            logits = torch.full((1, tokens_BX.shape[1], 6), -torch.inf)
            logits[..., 2] = 0.0
            return logits

    for nodes in range(1, 9):
        _, trees = expand(Certain(), torch.zeros(1, 1, dtype=torch.long), DynamicTree(nodes, 3, 5)).best(nodes)
        tree = trees.of_row(0)
        assert all(0 <= parent < node for node, parent in enumerate(tree.parents[1:], start=1))
        assert tree.depth == min(nodes, 5)


@pytest.mark.parametrize("executor", ["eager", "lean"])
@pytest.mark.parametrize("name", HEADS)
def test_every_row_with_its_own_tree_gets_the_tokens_of_plain_decoding(name, executor, monkeypatch):
    model = head_model(name, dtype=torch.float64)
    lengths, shapes = set(), set()
    original = DynamicTreeDrafter.block

    def recording(self, standing, last_B1, *, depth):
        block = original(self, standing, last_B1, depth=depth)
        shapes.update(tree.parents for tree in block.tree.trees)
        return block

    monkeypatch.setattr(DynamicTreeDrafter, "block", recording)
    for request in (
        {},
        {"eos_token_id": [5, 11], "pad_token_id": 0, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": True, "seed": [5, 6, 7, 8], "top_p": 0.9},
    ):
        plain = model.generate(RAGGED.input_ids, num_draft_tokens=0, **OPTIONS, **request)
        for scripted, nodes in ((False, 9), (True, None)):
            with monkeypatch.context() as patch:
                if scripted:
                    script_levels(patch, plain[:, RAGGED.input_ids.shape[1] :].tolist(), ranks=2)
                result = model.generate(
                    RAGGED.input_ids,
                    tree="dynamic",
                    tree_nodes=nodes,
                    executor=executor,
                    return_dict_in_generate=True,
                    **OPTIONS,
                    **request,
                )
            assert torch.equal(result.sequences, plain), request
            lengths.update(length for row in result.acceptance.lengths for length in row)
    assert lengths == {1, 2, 3, 4}
    assert len(shapes) > 10


@pytest.mark.parametrize("family", ["qwen3-sliding", "gemma3_text", "gpt2", "mistral-sliding"])
def test_families_with_windows_and_learned_positions_take_trees_of_rows(family, monkeypatch):
    model = tiny_model(family, dtype=torch.float64)
    plain = model.generate(RAGGED.input_ids, num_draft_tokens=0, **OPTIONS)
    script_levels(monkeypatch, plain[:, RAGGED.input_ids.shape[1] :].tolist())
    result = model.generate(RAGGED.input_ids, tree="dynamic", return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(result.sequences, plain)
    assert result.acceptance.mean_acceptance_length > 2


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "drafts", [{"drafts": "heads+lookup"}, {"num_draft_tokens": "auto"}, {"num_draft_tokens": 2, "tree_width": 1}]
)
def test_copies_and_changing_lengths_go_with_dynamic_trees(name, drafts):
    model = head_model(name, dtype=torch.float64)
    repeating = RAGGED.input_ids % 3 + 1
    plain = model.generate(repeating, num_draft_tokens=0, **OPTIONS)
    assert torch.equal(model.generate(repeating, tree="dynamic", **OPTIONS, **drafts), plain)


def test_copied_text_may_be_the_longest_path_beside_a_dynamic_tree():
    model = tiny_model(dtype=torch.float64)
    plain = model.generate(random_tokens(1, 5), max_new_tokens=200, num_draft_tokens=0)
    options = {"drafts": "heads+lookup", "tree": "dynamic", "num_lookup_tokens": 6, "return_dict_in_generate": True}
    result = model.generate(plain[:, :150], max_new_tokens=50, **options)
    assert torch.equal(result.sequences, plain[:, :200])
    assert max(map(max, result.acceptance.lengths)) == 7


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_equal_trees_in_all_rows_are_seen_as_one_tree(family):
    config, tree = FAMILIES[family](), Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
    window = getattr(config, "sliding_window", None)
    windows = [None, window] if getattr(config, "layer_types", None) else [window]
    cache = RaggedCache(windows, batch=2, capacity=40, device=torch.device("cpu"))
    masks = BlockMasks(config, cache, width=len(tree), dtype=torch.float32, device=torch.device("cpu"))
    root_B1 = torch.tensor([[17], [12]])
    cache.begin_ragged(root_B1 + torch.arange(len(tree)), first=12, end=17 + len(tree))
    one, several = masks.ragged_tree(tree, root_B1), masks.row_trees(RowTrees((tree, tree)), root_B1)
    for kind in sorted(one) if isinstance(one, dict) else [None]:
        first, second = (mask if kind is None else mask[kind] for mask in (one, several))
        assert torch.equal(first, second)


def test_ancestors_of_rows_are_those_of_their_trees():
    trees = RowTrees((Tree.chain(6), Tree.from_choices([(0,), (1,), (1, 0), (1, 1), (1, 1, 0), (1, 1, 0, 0)])))
    for row in range(2):
        assert torch.equal(trees.ancestors()[row], trees.of_row(row).ancestors())
    with pytest.raises(ValueError, match="equally many nodes"):
        RowTrees((Tree.chain(1), Tree.chain(2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree_nodes": 5}, "tree_nodes=5 is for dynamic trees"),
        ({"tree": 5, "tree_width": 2}, "tree_width=2 is for dynamic trees"),
        ({"tree": "dynamic", "tree_nodes": 0}, "tree_nodes must be a whole number of at least 1: got 0"),
        ({"tree": "dynamic", "sample_drafts": True, "do_sample": True}, "so it cannot be drawn"),
        ({"tree": "dynamic", "drafts": "lookup"}, "drafts='heads' or 'heads"),
    ],
)
def test_dynamic_trees_that_cannot_be_are_refused(options, message):
    with pytest.raises(DecodingError, match=message):
        tiny_model().generate(random_tokens(1, 4), max_new_tokens=3, **options)
