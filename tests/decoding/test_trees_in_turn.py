"""Trees of heads that draft in turn: every node has the candidates of its own path, and the text is the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoding_cases import ragged_batch, script_levels
from head_cases import head_model
from headway.decoding.drafting import TreeDrafter
from headway.decoding.executor import EagerExecutor
from headway.decoding.tree_drafting import PathTreeDrafter
from headway.functional.tree import Tree
from tiny_models import tiny_model

NEW = 24
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (2, 0, 1), (2, 0, 0)]
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")
HEADS = ["linear-tap-markov", "transformer-markov", "medusa-2-blocks-shared-markov", "hydra", "sequential-shared"]
OPTIONS: dict[str, Any] = {"attention_mask": RAGGED.attention_mask, "max_new_tokens": NEW}


def recorded_blocks(monkeypatch, drafter):
    """Every block with the row's new tokens before it."""
    blocks = []
    original = drafter.block

    def recording(self, standing, last_B1, *, depth):
        block = original(self, standing, last_B1, depth=depth)
        blocks.append((list(standing.made), block))
        return block

    monkeypatch.setattr(drafter, "block", recording)
    return blocks


@pytest.mark.parametrize("executor", ["eager", "lean"])
@pytest.mark.parametrize("name", HEADS)
def test_every_node_holds_the_token_of_its_rank_after_its_own_path(name, executor, monkeypatch):
    model = head_model(name, dtype=torch.float64)
    blocks = recorded_blocks(monkeypatch, PathTreeDrafter)
    text = model.generate(RAGGED.input_ids, tree=TREE, executor=executor, **OPTIONS)
    checked = 0
    for made, block in blocks[1:3]:
        for row, prompt in enumerate(RAGGED.rows()):
            known = [*prompt[0].tolist(), *text[row, RAGGED.input_ids.shape[1] :].tolist()[: made[row]]]
            assert block.tokens_BM[row, 0] == known[-1]
            for node in range(1, len(block.tree)):
                path = [int(block.tokens_BM[row, above]) for above in block.tree.path(node)]
                with torch.no_grad():
                    logits = model(torch.tensor([known + path]), return_future_logits=True).future_logits
                own_V = logits[0, len(known) - 2, len(path)]
                assert int(own_V.argsort(descending=True)[block.tree.ranks[node]]) == path[-1]
                checked += 1
    assert checked >= 4 * len(TREE)


@pytest.mark.parametrize("executor", ["eager", "lean"])
@pytest.mark.parametrize("name", HEADS)
def test_every_path_gives_the_tokens_of_plain_decoding(name, executor, monkeypatch):
    model = head_model(name, dtype=torch.float64)
    lengths = set()
    for request in (
        {},
        {"eos_token_id": [5, 11], "pad_token_id": 0},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": True, "seed": 3, "top_p": 0.9},
    ):
        plain = model.generate(RAGGED.input_ids, num_draft_tokens=0, **OPTIONS, **request)
        with monkeypatch.context() as patch:
            script_levels(patch, plain[:, RAGGED.input_ids.shape[1] :].tolist())
            result = model.generate(
                RAGGED.input_ids, tree=TREE, executor=executor, return_dict_in_generate=True, **OPTIONS, **request
            )
        assert torch.equal(result.sequences, plain)
        lengths.update(length for row in result.acceptance.lengths for length in row)
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "drafts",
    [{"drafts": "heads+lookup"}, {"drafts": "heads+lookup", "tree": TREE}, {"num_draft_tokens": "auto", "tree": 9}],
)
def test_copies_and_changing_lengths_go_with_such_trees(name, drafts):
    model = head_model(name, dtype=torch.float64)
    repeating = RAGGED.input_ids % 3 + 1
    plain = model.generate(repeating, num_draft_tokens=0, **OPTIONS)
    assert torch.equal(model.generate(repeating, **OPTIONS, **drafts), plain)


def test_heads_that_draft_at_once_get_the_same_tree_node_by_node(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    blocks = recorded_blocks(monkeypatch, TreeDrafter)
    model.generate(RAGGED.input_ids, tree=TREE, **OPTIONS)
    monkeypatch.setattr(EagerExecutor, "drafts_in_turn", True)
    by_path = recorded_blocks(monkeypatch, PathTreeDrafter)
    model.generate(RAGGED.input_ids, tree=TREE, **OPTIONS)
    assert len(blocks) == len(by_path) > 5
    for (_, one), (_, other) in zip(blocks, by_path, strict=True):
        assert torch.equal(one.tokens_BM, other.tokens_BM)


def test_the_comparison_with_paths_would_notice_candidates_of_another_node(monkeypatch):
    monkeypatch.setattr(
        EagerExecutor, "_markov_bias", lambda self, tokens_BX: self._model.heads.markov(tokens_BX.roll(1, dims=1))
    )
    with pytest.raises(AssertionError):
        test_every_node_holds_the_token_of_its_rank_after_its_own_path("linear-tap-markov", "eager", monkeypatch)


@pytest.mark.parametrize("name", ["linear-tap-markov", "hydra", "sequential"])
def test_drawn_trees_ask_for_the_distribution_after_the_path(name, monkeypatch):
    model = head_model(name, dtype=torch.float64)
    asked = []
    begin = EagerExecutor.begin_levels

    def recording(self, states, nodes, *, count):
        levels = begin(self, states, nodes, count=count)
        own = []
        asked.append(own)
        return lambda tokens_BX, parents_BX: own.append((tokens_BX, levels(tokens_BX, parents_BX))) or own[-1][1]

    monkeypatch.setattr(EagerExecutor, "begin_levels", recording)
    text = model.generate(RAGGED.input_ids, tree=TREE, do_sample=True, seed=1, sample_drafts=True, **OPTIONS)
    ids = RAGGED.rows()[1][0].tolist()
    known = [*ids, int(text[1, RAGGED.input_ids.shape[1]])]
    (root_B1, _), (depth_1_BX, logits_BXV) = asked[0][:2]
    assert root_B1[1].tolist() == known[-1:]
    assert depth_1_BX.shape[1] == 3
    for place, token in enumerate(depth_1_BX[1].tolist()):
        with torch.no_grad():
            teacher = model(torch.tensor([[*known, token]]), return_future_logits=True).future_logits
        assert torch.allclose(logits_BXV[1, place], teacher[0, len(ids) - 1, 2])


def test_a_branch_knows_its_own_tokens_and_no_others():
    tree = Tree.from_choices(TREE)
    assert [len(level.parents) for level in tree.levels] == [1, 3, 3]
    assert tree.levels[2].parents == (0, 1, 2)
