"""Comparing two greedy generations finds the first difference and how near the choice was."""

from __future__ import annotations

import pytest
import torch

from decoding_cases import ragged_batch
from headway.decoding.choosing import Emission, GreedyChooser
from headway.decoding.compare import compare_greedy, top_two_gap
from headway.errors import DecodingError
from tiny_models import random_tokens, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_the_two_ways_of_decoding_are_identical(model):
    batch = ragged_batch([4, 7, 2], "lrl")
    comparison = compare_greedy(model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=16)
    assert comparison.identical
    assert comparison.identical_but_for_near_ties
    assert comparison.first_difference == (None, None, None)
    assert comparison.logit_gap == (None, None, None)
    assert comparison.near_ties == 0
    assert comparison.plain.mode == "plain"
    assert comparison.self_speculative.mode == "self-speculative"


def test_a_difference_is_found_and_its_gap_measured(model, monkeypatch):
    batch = ragged_batch([4, 7, 2], "lrl")
    choose = GreedyChooser.choose

    def spoil(self, logits_BMV, block_BM, rooms, **tree):
        emissions = choose(self, logits_BMV, block_BM, rooms)
        # Row 1 of the drafted generation gets one wrong token, the fourth or a later one.
        wrong = block_BM.shape[1] > 1 and rooms[1] <= 16 - 3 and emissions[1] is not None
        if wrong:
            tokens = [(emissions[1].tokens[0] + 1) % 40]
            emissions[1] = Emission(tokens, 0, emissions[1].finished)
        return emissions

    monkeypatch.setattr(GreedyChooser, "choose", spoil)
    comparison = compare_greedy(model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=16)
    assert not comparison.identical
    assert not comparison.identical_but_for_near_ties
    assert comparison.first_difference[0] is comparison.first_difference[2] is None
    place = comparison.first_difference[1]
    assert place >= 3
    prefix = [*batch.rows()[1][0].tolist(), *comparison.plain.sequences[1, 7 : 7 + place].tolist()]
    best, second = model(torch.tensor([prefix])).logits[0, -1].double().topk(2).values.tolist()
    assert comparison.logit_gap[1] == pytest.approx(best - second)
    assert top_two_gap(model, prefix) == pytest.approx(best - second)


def test_a_near_tie_is_told_from_an_error(model):
    row = random_tokens(1, 4)
    with torch.no_grad():
        head = model.family.lm_head.weight
        kept = head.clone()
        head[7] = head[9]
    try:
        hidden = model.offset_hidden_states(row, use_cache=False).last_hidden_BTD[0, -1]
        with torch.no_grad():
            head[7] = head[9] = 5 * hidden
        assert top_two_gap(model, row[0].tolist()) == 0.0
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_sampled_generations_are_not_compared(model):
    with pytest.raises(DecodingError, match="leave do_sample out"):
        compare_greedy(model, random_tokens(1, 4), max_new_tokens=4, do_sample=True)
