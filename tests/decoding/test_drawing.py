"""The fast path of sampling draws, token for token, what the general one draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, TemperatureLogitsWarper
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding_cases import ragged_batch
from headway.decoding import engine
from headway.decoding.drawing import DrawnChooser, draw_rows, reads_scores_alone
from headway.decoding.history import History
from headway.decoding.scored import RowSeeds, ScoredChooser
from headway.functional.acceptance import sample_and_match
from headway.functional.sampling import inverse_cdf
from headway.functional.tree import Tree
from tiny_models import tiny_model

VOCABULARY, ROOM = 7, 12
TREES = [None, Tree.chain(3), Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])]
WARPERS = [
    [],
    [TemperatureLogitsWarper(0.7)],
    [TemperatureLogitsWarper(1.5), TopKLogitsWarper(3)],
    [TemperatureLogitsWarper(0.9), TopPLogitsWarper(0.8)],
    [MinPLogitsWarper(0.2)],
]


def choosers(warpers, ends, seed):
    processors = LogitsProcessorList(warpers)
    history = History(
        torch.ones(3, 4, dtype=torch.long),
        max_new_tokens=ROOM,
        pad_token_id=0,
        logits_processor=processors,
        stopping_criteria=lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool),
        gate=None,
    )
    general = ScoredChooser(
        history, rule=sample_and_match, seeds=RowSeeds(seed), end_token_ids=ends, other_criteria=False
    )
    return general, DrawnChooser(ends, processors=processors, seeds=RowSeeds(seed), max_new_tokens=ROOM)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tree=st.sampled_from(TREES),
    warpers=st.sampled_from(WARPERS),
    rooms=st.lists(st.integers(0, ROOM), min_size=3, max_size=3),
    ends=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_tokens_ends_and_accepted_drafts_are_those_of_the_general_rule(seed, tree, warpers, rooms, ends, dtype):
    generator = torch.Generator().manual_seed(seed)
    positions = 3 if tree is None else len(tree)
    # Few tokens and sharp scores, so that drafts are often right.
    logits_BMV = (2 * torch.randn(3, positions, VOCABULARY, generator=generator)).to(dtype)
    block_BM = logits_BMV.argmax(-1).roll(1, dims=1)
    general, fast = choosers(warpers, ends, seed)
    expected = general.choose(logits_BMV.clone(), block_BM, rooms, tree=tree)
    found = fast.choose(logits_BMV.clone(), block_BM, rooms, tree=tree)
    assert found == expected
    for own, other in zip(found, expected, strict=True):
        if own is not None and not own.finished:
            assert own.last_node == other.last_node


def test_many_rows_are_drawn_as_one_alone():
    scores_RV = torch.randn(40, VOCABULARY)
    uniform_R = torch.rand(40, dtype=torch.float64)
    uniform_R[0], uniform_R[1] = 0.0, 1 - 2.0**-53
    alone = [
        inverse_cdf(scores_V.double().softmax(-1), float(number))
        for scores_V, number in zip(scores_RV, uniform_R, strict=True)
    ]
    assert draw_rows(scores_RV, uniform_R).tolist() == alone


def test_scores_that_allow_no_token_are_an_error_where_they_are_used_and_nowhere_else():
    _, fast = choosers([], frozenset(), 0)
    logits_BMV = torch.zeros(3, 2, VOCABULARY)
    logits_BMV[0, 1] = -torch.inf
    # The draft of the first row is wrong, so nobody draws behind it.
    wrong = fast.choose(logits_BMV, torch.full((3, 2), VOCABULARY), [5, 0, 5])
    assert len(wrong[0].tokens) == 1
    logits_BMV[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="cannot draw a token"):
        fast.choose(logits_BMV, torch.full((3, 2), VOCABULARY), [5, 0, 5])


def test_only_processors_that_read_scores_alone_are_taken():
    assert reads_scores_alone([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.9)])
    assert not reads_scores_alone([TemperatureLogitsWarper(0.5), MinLengthLogitsProcessor(3, 0)])
    assert not reads_scores_alone([lambda ids, scores: scores])


@pytest.mark.parametrize("tree", [None, 5])
def test_generated_text_is_that_of_the_general_path(tree, monkeypatch):
    model, batch = tiny_model(num_future_tokens=4).eval(), ragged_batch([5, 3, 4], "llr")
    prompts = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pad_token_id": 0}
    options = {"do_sample": True, "temperature": 0.6, "top_k": 8, "seed": 3, "max_new_tokens": 20, "tree": tree}
    taken = []
    choose = DrawnChooser.choose
    monkeypatch.setattr(DrawnChooser, "choose", lambda self, *a, **k: taken.append(1) or choose(self, *a, **k))
    fast = model.generate(**prompts, **options)
    assert taken
    count = len(taken)
    monkeypatch.setattr(engine, "reads_scores_alone", lambda processors: False)
    assert torch.equal(model.generate(**prompts, **options), fast)
    assert len(taken) == count
