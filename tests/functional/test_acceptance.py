"""Acceptance rules decide as their papers say; their output laws are in `test_acceptance_laws.py`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.functional.acceptance import (
    DistanceAcceptance,
    Draft,
    TopKAcceptance,
    TypicalAcceptance,
    Verdict,
    accept_greedy_chain,
    block_verification,
    greedy_match,
    speculative_sampling,
)
from headway.functional.sampling import KeyedDraws
from headway.functional.tree import Tree


@given(st.data())
def test_it_equals_feeding_the_tokens_one_by_one(data):
    batch = data.draw(st.integers(1, 4))
    drafted = data.draw(st.integers(0, 5))
    tokens = st.integers(0, 2)
    draft = [[data.draw(tokens) for _ in range(drafted)] for _ in range(batch)]
    target = [[data.draw(tokens) for _ in range(drafted + 1)] for _ in range(batch)]
    expected = []
    for proposals, choices in zip(draft, target, strict=True):
        count = 0
        while count < drafted and proposals[count] == choices[count]:
            count += 1
        expected.append(count)
    found = accept_greedy_chain(torch.tensor(draft).reshape(batch, drafted), torch.tensor(target))
    assert found.tolist() == expected
    assert found.dtype == torch.long


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4)])
def test_targets_that_do_not_belong_to_the_draft_are_refused(shape):
    with pytest.raises(ValueError, match="K \\+ 1 targets"):
        accept_greedy_chain(torch.zeros(2, 3), torch.zeros(shape))


def _decide(rule, draft, targets):
    """The verdict where the model predicts `targets[node]` after each node."""
    walk = rule(draft, KeyedDraws(0, 0, 0))
    node = next(walk)
    try:
        while True:
            node = walk.send(targets[node])
    except StopIteration as stop:
        return stop.value


def _chain(*tokens, **options):
    return Draft(Tree.chain(len(tokens)), [0, *tokens], **({"depth": 9, "room": 9} | options))


def _one_hot(*tokens, of=5):
    return [torch.nn.functional.one_hot(torch.tensor(token), of).double() for token in tokens]


def test_a_greedy_walk_follows_the_models_choice_through_a_tree():
    tree = Tree.from_choices([(0,), (1,), (0, 0), (1, 0), (1, 1)])
    draft = Draft(tree, [0, 3, 4, 1, 1, 2], depth=9, room=9)
    targets = _one_hot(4, 0, 2, 0, 0, 3)
    assert _decide(greedy_match, draft, targets) == Verdict((2, 5), 3)


def test_a_walk_ends_at_an_end_token_and_at_the_rooms_end_without_a_further_token():
    targets = _one_hot(1, 2, 3, 4)
    assert _decide(greedy_match, _chain(1, 2, 3), targets) == Verdict((1, 2, 3), 4)
    assert _decide(greedy_match, _chain(1, 2, 3, ends=frozenset({2})), targets) == Verdict((1, 2), None)
    assert _decide(greedy_match, _chain(1, 2, 3, room=1), targets) == Verdict((1,), None)
    assert _decide(greedy_match, _chain(1, 2, 3, depth=2), targets) == Verdict((1, 2), 3)
    assert _decide(greedy_match, _chain(1, -1, 3), targets) == Verdict((1,), 2)


def test_typical_acceptance_takes_what_is_likely_enough_given_the_entropy():
    # The paper's threshold for this distribution is min(0.09, 0.3 exp(-H)) = 0.09, with H = 1.14 nats.
    target = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    accepted = [bool(_decide(TypicalAcceptance(), _chain(token), [target] * 2).nodes) for token in range(5)]
    assert accepted == [True, True, True, False, False]
    flat = torch.full((5,), 0.2, dtype=torch.float64)  # exp(-H) = 0.2: the threshold is 0.06
    assert _decide(TypicalAcceptance(), _chain(4), [flat] * 2).nodes == (1,)
    assert _decide(TypicalAcceptance(threshold=0.9, alpha=1.1), _chain(4), [flat] * 2).nodes == ()


def test_the_longest_accepted_path_wins_and_then_the_likeliest():
    tree = Tree.from_choices([(0,), (1,), (2,), (1, 0), (2, 0)])
    target = torch.tensor([0.2, 0.3, 0.25, 0.15, 0.1], dtype=torch.float64)
    draft = Draft(tree, [0, 1, 2, 3, 0, 0], depth=9, room=9)
    assert _decide(TopKAcceptance(4, sampled=True), draft, [target] * 6).nodes == (2, 4)
    assert _decide(TopKAcceptance(1, sampled=True), draft, [target] * 6).nodes == (1,)


def test_top_k_acceptance_at_temperature_0_ranks_scores():
    scores = torch.tensor([-1.0, 4.0, 3.0, -math.inf, 0.0])
    accepted = [
        bool(_decide(TopKAcceptance(4, sampled=False), _chain(token), [scores] * 2).nodes) for token in range(5)
    ]
    assert accepted == [True, True, True, False, True]
    assert _decide(TopKAcceptance(1, sampled=False), _chain(2), [scores] * 2) == Verdict((), 1)
    assert _decide(TopKAcceptance(9, sampled=False), _chain(3), [scores] * 2) == Verdict((), 1)


def test_distance_acceptance_measures_from_the_models_own_choice():
    targets = _one_hot(2, 4)
    assert _decide(DistanceAcceptance(1, sampled=False), _chain(3), targets) == Verdict((1,), 4)
    assert _decide(DistanceAcceptance(0, sampled=False), _chain(3), targets) == Verdict((), 2)
    assert _decide(DistanceAcceptance(1, sampled=True), _chain(4), targets) == Verdict((), 2)


def test_rules_for_drawn_drafts_want_to_know_what_they_were_drawn_from():
    target = torch.full((5,), 0.2, dtype=torch.float64)
    for rule in (speculative_sampling, block_verification):
        with pytest.raises(ValueError, match="draft_probs"):
            _decide(rule, _chain(1), [target] * 2)
