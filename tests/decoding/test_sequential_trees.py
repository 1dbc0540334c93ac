"""Trees of sequential modules: every node says what a chain along its own path would have said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decoding_cases import ragged_batch, script_levels
from head_cases import head_model
from headway.decoding.draft_places import CachePlaces, block_slots
from headway.decoding.engine import decoding_context
from headway.decoding.executor import EagerExecutor
from headway.decoding.loop import DecodingLoop
from headway.decoding.prompts import Prompts
from headway.functional.row_trees import DynamicTree
from headway.functional.tree import Tree

NEW = 14
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (2, 0, 1), (2, 0, 0)]
# A row of one token, after whose first draft some entries of the deeper modules have no position.
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")
DRAFTS: dict[str, dict[str, Any]] = {
    "tree": {"tree": TREE},
    "dynamic": {"tree": "dynamic", "tree_nodes": 3, "tree_width": 4},
    "default": {"tree": 9},
    "pieces": {"tree": TREE, "prefill_chunk_tokens": 4},
    "copies": {"tree": TREE, "drafts": "heads+lookup"},
    "chain-and-copies": {"drafts": "heads+lookup"},
    "changing": {"tree": TREE, "num_draft_tokens": "auto"},
}


def chain_alone(model: Any, known: list[int], path: list[int]) -> list[Tensor]:
    """The definition: logits [V] of every offset, drafted as a chain of given tokens after a text that is read anew."""
    prompts = Prompts(torch.tensor([known[:-1]]), [len(known) - 1])
    run = EagerExecutor(model, prompts, max_new_tokens=8, num_draft_tokens=model.num_future_tokens - 1)
    said: list[Tensor] = []

    def pick(logits_BV: Tensor, offset: int) -> Tensor:
        said.append(logits_BV[0])
        return torch.tensor([[*path, 0][offset - 2]])

    with decoding_context(model):
        states = run.prefill(num_offsets=model.num_future_tokens)
        run.draft_picked(states, [0], last_B=torch.tensor(known[-1:]), count=len(path) + 1, pick=pick)
    return said


def recorded_drafts(patch: pytest.MonkeyPatch) -> list[tuple[list[int], list[tuple[Tensor, Tensor, Tensor]]]]:
    """Of every draft the rows' new tokens before it, and (tokens, parents, logits) of its levels."""
    drafts: list[Any] = []
    begin, next_block = EagerExecutor.begin_levels, DecodingLoop._next_block

    def following(self, states, emissions, longest):
        drafts.append(([self.max_new_tokens - room for room in self._rooms], []))
        return next_block(self, states, emissions, longest)

    def recording(self, states, nodes, *, count):
        levels, own = begin(self, states, nodes, count=count), drafts[-1][1]

        def level(tokens_BX, parents_BX):
            parents = torch.zeros_like(tokens_BX) if parents_BX is None else parents_BX
            own.append((tokens_BX, parents, levels(tokens_BX, parents_BX)))
            return own[-1][2]

        return level

    patch.setattr(DecodingLoop, "_next_block", following)
    patch.setattr(EagerExecutor, "begin_levels", recording)
    return drafts


def compare_with_chains(
    name: str, family: str, executor: str, options: dict[str, Any], *, num_future_tokens: int = 4
) -> int:
    """Fails where a node of a draft says anything else than a chain; the number of nodes compared."""
    model = head_model(name, family, dtype=torch.float64, num_future_tokens=num_future_tokens)
    arguments: dict[str, Any] = {"attention_mask": RAGGED.attention_mask, "max_new_tokens": NEW}
    text = model.generate(RAGGED.input_ids, num_draft_tokens=0, **arguments)[:, RAGGED.input_ids.shape[1] :].tolist()
    with pytest.MonkeyPatch.context() as patch:
        drafts = recorded_drafts(patch)
        script_levels(patch, text)
        made = model.generate(RAGGED.input_ids, executor=executor, **arguments, **options)
    assert made[:, RAGGED.input_ids.shape[1] :].tolist() == text
    compared = 0
    for counts, levels in drafts[:3]:
        for row, prompt in enumerate(RAGGED.rows()):
            known = [*prompt[0].tolist(), *text[row][: counts[row]]]
            if counts[row] == NEW or not levels:
                continue
            paths: list[list[int]] = [[]]
            for depth, (tokens_BX, parents_BX, logits_BXV) in enumerate(levels):
                nodes = zip(tokens_BX[row].tolist(), parents_BX[row].tolist(), strict=True)
                paths = [[*paths[parent], token] for token, parent in nodes] if depth else [[]]
                for place, path in enumerate(paths):
                    said_V, own_V = chain_alone(model, known, path)[-1], logits_BXV[row, place]
                    assert torch.allclose(said_V, own_V, rtol=1e-9, atol=1e-9), (row, path)
                    assert torch.equal(said_V.argsort(descending=True)[:4], own_V.argsort(descending=True)[:4])
                    compared += 1
    return compared


@pytest.mark.parametrize("drafts", DRAFTS)
def test_every_node_says_what_a_chain_along_its_path_says(drafts):
    assert compare_with_chains("sequential", "llama", "eager", DRAFTS[drafts]) >= 24


@pytest.mark.parametrize(
    ("name", "family", "executor"),
    [
        ("sequential-fused-shared", "llama", "lean"),
        ("sequential-own-norm", "qwen3-sliding", "eager"),
        ("sequential", "mistral-sliding", "lean"),
        ("sequential-shared", "gemma3_text", "eager"),
        ("sequential-tap", "gpt2", "eager"),
    ],
)
def test_so_it_is_for_modules_of_every_kind_and_in_other_families(name, family, executor):
    assert compare_with_chains(name, family, executor, DRAFTS["tree"]) >= 60


@pytest.mark.parametrize("drafts", ["default", "chain-and-copies", "dynamic"])
def test_one_module_alone_repeats_nothing_and_says_the_same(drafts):
    assert compare_with_chains("sequential", "llama", "eager", DRAFTS[drafts], num_future_tokens=2) >= 8


@pytest.mark.parametrize("mistake", ["nodes see their neighbours", "nodes see old entries", "positions one too far"])
def test_the_comparison_with_chains_would_notice(mistake, monkeypatch):
    of_nodes, call = CachePlaces._of_nodes, CachePlaces.call

    def mask(self, start_B1, root_B1, place_BN, ancestors_BNN, known):
        if mistake == "nodes see their neighbours":
            ancestors_BNN = torch.ones_like(ancestors_BNN)
        if mistake == "nodes see old entries":
            root_B1 = root_B1 + 1
        return of_nodes(self, start_B1, root_B1, place_BN, ancestors_BNN, known)

    def moved(self, *args, depth, levels, **rest):
        shift = mistake == "positions one too far" and depth > 1
        return call(self, *args, depth=depth, levels=[level - shift for level in levels], **rest)

    monkeypatch.setattr(CachePlaces, "_of_nodes", mask)
    monkeypatch.setattr(CachePlaces, "call", moved)
    with pytest.raises(AssertionError):
        compare_with_chains("sequential", "llama", "eager", DRAFTS["tree"])


def test_the_cache_has_room_for_what_a_draft_considers_and_does_not_keep():
    heads = head_model("sequential").heads
    assert block_slots(heads, 3, Tree.chain(3)) == 4
    assert block_slots(heads, 3, Tree.from_choices(TREE)) == len(TREE) + 1
    assert block_slots(heads, 3, DynamicTree(3, 4, 3)) == 1 + 3 + 2 * 4
    assert block_slots(head_model("hydra").heads, 3, DynamicTree(3, 4, 3)) == 4
