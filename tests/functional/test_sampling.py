"""Reproducible draws: uniform numbers from keys, tokens from uniform numbers."""

from __future__ import annotations

import pytest
import torch

from headway.functional.sampling import KeyedDraws, inverse_cdf, keyed_uniform, residual, without_token


def test_keyed_numbers_are_uniform_and_independent_of_their_neighbours():
    numbers = torch.tensor([keyed_uniform(7, row, place) for row in range(40) for place in range(100)])
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    # 19 degrees of freedom: 50 is beyond the 99.98th percentile.
    assert float(((counts - 200) ** 2 / 200).sum()) < 50
    centred = numbers - 0.5
    for lag in (1, 2, 100):
        correlation = float((centred[:-lag] * centred[lag:]).mean() / centred.var())
        assert abs(correlation) < 5 / len(numbers) ** 0.5
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1


def test_a_known_number_never_changes():
    assert keyed_uniform(1, 2, 3) == keyed_uniform(1, 2, 3)
    assert len({keyed_uniform(*key) for key in [(1, 2, 3), (1, 3, 2), (12, 3), (1, 23), (-1, 2, 3)]}) == 5


def test_a_share_of_the_unit_interval_is_the_tokens_probability():
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    grid = (torch.arange(2000) + 0.5) / 2000
    tokens = torch.tensor([inverse_cdf(probs, float(number)) for number in grid])
    assert (torch.bincount(tokens, minlength=4) / 2000).tolist() == pytest.approx([0.2, 0, 0.5, 0.3], abs=1e-3)


@pytest.mark.parametrize("weights", [[0.0, 3.0, 0.0], [1e-300, 1.0, 0.0]])
def test_an_impossible_token_is_never_drawn_at_the_ends(weights):
    for number in (0.0, 1 - 2.0**-53):
        assert weights[inverse_cdf(torch.tensor(weights, dtype=torch.float64), number)] > 0


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_from_which_nothing_can_be_drawn_are_refused(weights):
    with pytest.raises(ValueError, match="cannot draw a token"):
        inverse_cdf(torch.tensor(weights), 0.5)


def test_residuals_are_what_the_draft_leaves():
    target, draft = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    assert residual(target, draft).tolist() == [1, 0, 0]
    assert torch.equal(residual(target, target), target)
    assert residual(target, draft * 0.5, weight=0.5).tolist() == pytest.approx([1, 0, 0])
    assert without_token(draft, 1).tolist() == pytest.approx([0.4, 0, 0.6])
    assert without_token(torch.tensor([0.0, 1.0]), 1).tolist() == [0, 0]


def test_the_texts_own_token_depends_on_its_position_and_not_on_where_a_block_begins():
    probs = torch.rand(50, generator=torch.Generator().manual_seed(0))
    early, late = KeyedDraws(3, 0, made=4), KeyedDraws(3, 0, made=6)
    assert [early.token(probs, depth + 2) for depth in range(20)] == [late.token(probs, depth) for depth in range(20)]
    assert [early.draft(probs, node + 2) for node in range(20)] != [late.draft(probs, node) for node in range(20)]
    assert [early.draft(probs, node) for node in range(20)] != [early.token(probs, node) for node in range(20)]
    assert [KeyedDraws(3, 1, 4).token(probs, depth) for depth in range(20)] != [
        early.token(probs, depth) for depth in range(20)
    ]


def test_a_decision_has_its_probability():
    accepted = sum(KeyedDraws(5, 0, made).accept(0.3, 1) for made in range(4000))
    assert abs(accepted / 4000 - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert all(KeyedDraws(5, 0, made).accept(1.0, 1) for made in range(100))
