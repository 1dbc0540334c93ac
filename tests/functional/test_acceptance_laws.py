"""The output law of every lossless rule is the model's own, enumerated exactly; subtle mistakes are not missed."""

from __future__ import annotations

import pytest
import torch

from enumerated_law import Language, completed, decide, draw_draft, law_of, total_variation
from headway.functional import acceptance
from headway.functional.acceptance import (
    Draft,
    TypicalAcceptance,
    block_verification,
    sample_and_match,
    speculative_sampling,
)
from headway.functional.tree import Tree

EXACT = 1e-12
CHAINS = {f"chain of {length}": Tree.chain(length) for length in (0, 1, 2, 3)}
TREES = {
    "two": Tree.from_choices([(0,), (1,)]),
    "three": Tree.from_choices([(0,), (1,), (2,)]),
    "deep and wide": Tree.from_choices([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "chain with a branch": Tree.chain(2).with_branch(2),
}


def _drawn_block(rule, tree, language, drafter=None, **options):
    """The law of the tokens that one block with drawn drafts emits."""
    depth = options.pop("depth", lambda tokens: tree.depth)

    def program(draws):
        tokens, probs = draw_draft(tree, drafter or language.drafter, draws)
        chosen = depth(tokens)
        draft = Draft(tree, tokens, depth=chosen, room=options.get("room", 99), draft_probs=probs)
        return decide(rule, draft, language, draws)

    return law_of(program)


def _distance(law, language, length):
    return total_variation(completed(law, language, length), language.law(length))


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rule", [speculative_sampling, block_verification])
def test_drawn_chains_give_the_models_law(rule, chain, seed, zeros):
    tree, language = CHAINS[chain], Language(seed, zeros=zeros, nearness=0.3 * (seed % 3))
    law = _drawn_block(rule, tree, language)
    assert sum(law.values()) == pytest.approx(1, abs=EXACT)
    assert _distance(law, language, tree.depth + 1) < EXACT


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", TREES)
def test_drawn_trees_give_the_models_law(shape, seed, zeros):
    tree, language = TREES[shape], Language(seed, zeros=zeros, nearness=0.4 * (seed % 2))
    law = _drawn_block(speculative_sampling, tree, language)
    assert _distance(law, language, tree.depth + 1) < EXACT


def _point_masses(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    return [0, *torch.randint(-1, 3, (len(tree) - 1,), generator=generator).tolist()]


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", CHAINS | TREES)
def test_candidates_from_anywhere_give_the_models_law_when_matched(shape, seed, zeros):
    tree, language = (CHAINS | TREES)[shape], Language(seed, zeros=zeros)
    draft = Draft(tree, _point_masses(tree, seed), depth=99, room=99)
    law = law_of(lambda draws: decide(sample_and_match, draft, language, draws))
    assert _distance(law, language, tree.depth + 1) < EXACT


@pytest.mark.parametrize("rule", [speculative_sampling, block_verification, sample_and_match])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_limit_cuts_the_text_and_not_its_law(rule, room):
    tree, language = Tree.chain(2), Language(5, nearness=0.5)
    law = _drawn_block(rule, tree, language, room=room)
    assert max(map(len, law)) == min(room, 3)
    assert _distance(law, language, room) < EXACT


@pytest.mark.parametrize("rule", [speculative_sampling, block_verification])
@pytest.mark.parametrize("seed", range(3))
def test_an_end_token_in_the_draft_ends_it_and_changes_no_law(rule, seed):
    tree, language = Tree.chain(3), Language(seed, nearness=0.5)

    def program(draws):
        tokens, probs = draw_draft(tree, language.drafter, draws)
        draft = Draft(tree, tokens, depth=3, room=99, ends=frozenset({1}), draft_probs=probs)
        return decide(rule, draft, language, draws)

    law = law_of(program)
    assert not any(1 in emitted[:-1] for emitted in law)
    assert _distance(law, language, 4) < EXACT


def test_a_chain_may_stop_after_a_token_because_of_it_but_not_before_one_because_of_it():
    tree, language = Tree.chain(3), Language(3, nearness=0.5)

    def program(depth_of):
        def run(draws):
            tokens, probs = draw_draft(tree, language.drafter, draws)
            draft = Draft(tree, tokens, depth=depth_of(tokens), room=99, draft_probs=probs)
            return decide(block_verification, draft, language, draws)

        return run

    after = law_of(program(lambda tokens: 1 if tokens[1] == 2 else 3))
    before = law_of(program(lambda tokens: 0 if tokens[1] == 2 else 3))
    assert _distance(after, language, 4) < EXACT
    assert _distance(before, language, 4) > 1e-3


def _mean_length(law):
    return sum(probability * len(emitted) for emitted, probability in law.items())


@pytest.mark.parametrize("seed", range(5))
def test_a_block_accepts_at_least_as_much_as_token_by_token(seed):
    language = Language(seed, nearness=0.4)
    by_token, by_block = (
        _mean_length(_drawn_block(rule, Tree.chain(3), language)) for rule in (speculative_sampling, block_verification)
    )
    assert by_block >= by_token - EXACT


def test_the_chance_to_accept_one_draft_is_the_overlap_of_the_two_distributions():
    language = Language(1)
    law = _drawn_block(speculative_sampling, Tree.chain(1), language)
    overlap = float(torch.minimum(language.target([]), language.drafter([])).sum())
    assert _mean_length(law) == pytest.approx(1 + overlap, abs=EXACT)


# ---------------------------------------------------------------------------------------------------- planted mistakes


def _wrong_residual(target_V, draft_V, *, weight=1.0):
    """From p instead of p - q."""
    return target_V


def _cold(probs_V):
    """The same at another temperature."""
    return probs_V**1.02 / (probs_V**1.02).sum()


# Drafters near the model make each mistake subtle: at most 0.01 in total variation.
NEAR = Language(11, nearness=0.96)


@pytest.mark.parametrize("rule", [speculative_sampling, block_verification])
def test_a_residual_from_the_wrong_p_is_noticed(rule, monkeypatch):
    monkeypatch.setattr(acceptance, "residual", _wrong_residual)
    distance = _distance(_drawn_block(rule, Tree.chain(2), NEAR), NEAR, 3)
    assert 1e-6 < distance <= 0.01


def test_a_sibling_that_stays_in_q_is_noticed(monkeypatch):
    monkeypatch.setattr(acceptance, "without_token", lambda probs_V, token: probs_V)
    language = Language(11, nearness=0.995)
    distance = _distance(_drawn_block(speculative_sampling, TREES["two"], language), language, 2)
    assert 1e-6 < distance <= 0.01


@pytest.mark.parametrize("rule", [speculative_sampling, block_verification])
def test_a_q_before_temperature_is_noticed(rule):
    def program(draws):
        tokens, probs = draw_draft(Tree.chain(2), lambda prefix: _cold(NEAR.drafter(prefix)), draws)
        told = {node: NEAR.drafter([tokens[above] for above in Tree.chain(2).path(node)]) for node in probs}
        return decide(rule, Draft(Tree.chain(2), tokens, depth=2, room=99, draft_probs=told), NEAR, draws)

    assert 1e-6 < _distance(law_of(program), NEAR, 3) <= 0.01


@pytest.mark.parametrize("rule", [speculative_sampling, block_verification])
def test_a_draft_length_that_looks_ahead_is_noticed(rule):
    # Drops the second token where it is the drafter's least likely one after token 0.
    unlikely = [0, int(NEAR.drafter([0]).argmin())]
    law = _drawn_block(rule, Tree.chain(2), NEAR, depth=lambda tokens: 1 if tokens[1:] == unlikely else 2)
    assert 1e-6 < _distance(law, NEAR, 3) <= 0.01


def test_a_first_draft_taken_for_a_drawn_one_is_noticed():
    def program(draws):
        probs = {0: NEAR.drafter([])}
        tokens = [0, int(probs[0].argmax())]
        return decide(
            speculative_sampling, Draft(Tree.chain(1), tokens, depth=1, room=9, draft_probs=probs), NEAR, draws
        )

    assert _distance(law_of(program), NEAR, 2) > 0.01


def test_typical_acceptance_is_not_the_models_law():
    language = Language(2)
    draft = Draft(Tree.chain(1), [0, int(language.target([]).argmax())], depth=1, room=9)
    law = law_of(lambda draws: decide(TypicalAcceptance(), draft, language, draws))
    assert _distance(law, language, 2) > 0.01
