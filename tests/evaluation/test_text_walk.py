"""Walks of trees and copies along real text: equal to the chain's walk where it is defined, and honest for Markov heads."""

import pytest
import torch

from head_cases import head_model
from headway.errors import ConfigError
from headway.evaluation.acceptance import walk_acceptance
from headway.evaluation.text_walk import WalkedText, can_walk, read_text, walk_texts
from headway.functional.tree import Tree
from tiny_models import tiny_model


def random_text(model, length: int, seed: int = 0) -> list[int]:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, min(vocabulary, 6), (length,), generator=generator).tolist()


@pytest.mark.parametrize("drafts", [1, 3])
def test_a_chain_walks_as_the_chains_own_walk_does(drafts: int):
    model = tiny_model(num_future_tokens=4).eval()
    tokens = random_text(model, 60)
    known = walk_acceptance(model, torch.tensor([tokens]), num_draft_tokens=drafts)
    walk = walk_texts([read_text(model, tokens, num_candidates=1)], Tree.chain(drafts))
    assert (walk.blocks, walk.tokens_per_forward) == (known.blocks, known.mean_acceptance_length)


def test_a_tree_that_holds_the_chain_emits_at_least_as_much_per_forward():
    model = tiny_model(num_future_tokens=4).eval()
    texts = [read_text(model, random_text(model, 80, seed), num_candidates=3) for seed in range(3)]
    chain, tree = Tree.chain(3), Tree.from_choices([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])
    assert walk_texts(texts, tree).tokens_per_forward >= walk_texts(texts, chain).tokens_per_forward


def test_a_copy_is_checked_against_the_models_choices():
    # The text repeats 1 2 3; the model agrees everywhere but at its sixth token.
    tokens = (1, 2, 3, 1, 2, 3, 1, 2, 3)
    choices = (2, 3, 1, 2, 9, 1, 2, 3, 1)
    text = WalkedText(tokens, choices, tuple(() for _ in tokens))
    # Blocks at 0, 1, 2 (known: 1 2 3 1, copy 2 3: agreed 2, then 9), at 4 (copy 1 2: both agreed); 7 has no room.
    walk = walk_texts([text], Tree.chain(0), lookup=2)
    assert (walk.blocks, walk.tokens_per_forward, walk.copied) == (4, (1 + 1 + 2 + 3) / 4, 0.5)


def test_beside_a_tree_the_longer_of_both_counts():
    tokens = (1, 2, 3, 1, 2, 3, 1, 2)
    choices = (2, 3, 1, 2, 3, 1, 2, 3)
    ranks = tuple((-1, -1) if place else (0, 0) for place in range(8))
    text = WalkedText(tokens, choices, ranks)
    both = walk_texts([text], Tree.chain(2), lookup=2)
    assert both.tokens_per_forward >= walk_texts([text], Tree.chain(2)).tokens_per_forward
    assert both.tokens_per_forward == 3.0  # heads bring the first block, copies the next


def test_markov_heads_are_told_their_own_drafts_not_the_text():
    model = head_model("linear-tap-markov", num_future_tokens=4).eval()
    tokens = random_text(model, 24)
    text = read_text(model, tokens, num_candidates=model.get_input_embeddings().num_embeddings)
    place = 5
    hidden = model.offset_hidden_states(torch.tensor([tokens]), use_cache=False, num_offsets=4)
    with torch.no_grad():
        before = [tokens[place + 1], text.choices[place + 1], text.choices[place + 2]]
        for index, previous in enumerate(before):
            logits_V = model.offset_logits(
                hidden.hidden[index + 1][0, place], offset=index + 2, previous=torch.tensor(previous)
            )
            order = logits_V.sort(descending=True).indices.tolist()
            assert order.index(text.choices[place + 1 + index]) == text.ranks[place][index]


def test_heads_that_read_their_drafts_are_refused_by_name():
    model = head_model("sequential", num_future_tokens=3).eval()
    assert not can_walk(model)
    with pytest.raises(ConfigError, match="sequential heads read their own drafts"):
        read_text(model, [1, 2, 3], num_candidates=1)
