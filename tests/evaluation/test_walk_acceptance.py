import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ConfigError, DataError
from headway.evaluation.acceptance import summarize_blocks, walk_acceptance, walk_blocks


def slow_walk(model, ids, drafts):
    """Blocks of one document, each from full forwards over exactly the text that it may read."""
    lengths, t = [], 0
    while t + 1 + drafts < len(ids):
        drafted = model(ids[None, : t + 1], return_future_logits=True).future_logits[0, -1].argmax(-1)
        accepted = 0
        for offset in range(2, 2 + drafts):
            agreed = model(ids[None, : t + offset]).logits[0, -1].argmax(-1)
            if drafted[offset - 1] != agreed:
                break
            accepted += 1
        lengths.append(1 + accepted)
        t += 1 + accepted
    return lengths


def make_agreeable(model):
    """Heads that copy the last layer's weights and a small vocabulary: drafts are accepted now and then."""
    for head in model.heads:
        head.load_state_dict(model.family.last_layer.state_dict())
    with torch.no_grad():
        model.base.lm_head.weight[3:] = 0.0
    return model


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_the_walk_equals_blocks_computed_one_forward_at_a_time(model, drafts):
    model = make_agreeable(model).double()
    windows = torch.randint(0, 6, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [length for row in windows for length in slow_walk(model, row, drafts)]
    result = walk_acceptance(model, windows, num_draft_tokens=drafts, rows_per_forward=2)
    assert result == summarize_blocks(expected, num_draft_tokens=drafts, num_future_tokens=4)
    assert result.blocks == len(expected) > 5
    if drafts:
        assert sum(result.accepted) > 0, "the case must accept something to show anything"


def test_documents_are_walked_as_if_each_stood_alone(model):
    model = make_agreeable(model).double()
    ids = torch.randint(0, 6, (1, 40), generator=torch.Generator().manual_seed(2))
    cuts = [0, 11, 14, 31, 40]
    positions, documents = torch.zeros_like(ids), torch.zeros_like(ids)
    lengths = []
    for number, (start, end) in enumerate(pairwise(cuts)):
        positions[0, start:end] = torch.arange(end - start)
        documents[0, start:end] = number
        with torch.no_grad():
            lengths += slow_walk(model, ids[0, start:end], 3)
    expected = summarize_blocks(lengths, num_draft_tokens=3)
    assert walk_acceptance(model, ids, position_ids_BT=positions, document_ids_BT=documents) == expected
    assert walk_acceptance(model, ids, position_ids_BT=positions) == expected
    assert walk_acceptance(model, ids, document_ids_BT=documents) == expected
    assert expected != walk_acceptance(model, ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_walk_blocks_follows_its_definition_for_any_predictions_and_documents(data):
    length = data.draw(st.integers(1, 20))
    drafts = data.draw(st.integers(0, 3))
    predicted = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 1), min_size=1 + drafts, max_size=1 + drafts),
                min_size=length,
                max_size=length,
            )
        )
    )
    ends = sorted({*data.draw(st.lists(st.integers(1, length), max_size=3)), length})
    fits = torch.zeros(length, dtype=torch.bool)
    expected, start = [], 0
    for end in ends:
        for t in range(start, end):
            fits[t] = t + 1 + drafts < end
        t = start
        while t + 1 + drafts < end:
            accepted = 0
            while accepted < drafts and predicted[t, accepted + 1] == predicted[t + accepted + 1, 0]:
                accepted += 1
            expected.append(1 + accepted)
            t += 1 + accepted
        start = end
    assert walk_blocks(predicted[None], fits[None]) == expected


def test_rates_are_conditional_on_the_earlier_offsets_and_nan_where_never_drafted():
    result = summarize_blocks([1, 1, 2, 3], num_draft_tokens=2, num_future_tokens=5)
    assert result.acceptance_rate[:2] == (0.5, 0.5)
    assert all(math.isnan(rate) for rate in result.acceptance_rate[2:])
    assert result.drafted == (4, 2, 0, 0)
    assert result.accepted == (2, 1, 0, 0)
    assert result.length_counts == (2, 1, 1)
    assert result.mean_acceptance_length == pytest.approx(7 / 4)
    assert math.isnan(summarize_blocks([1, 1], num_draft_tokens=2).acceptance_rate[1])


def test_the_mean_follows_from_the_rates():
    result = summarize_blocks([1, 4, 2, 3, 3, 1, 4], num_draft_tokens=3)
    mean, product = 1.0, 1.0
    for rate in result.acceptance_rate:
        product *= rate
        mean += product
    assert result.mean_acceptance_length == pytest.approx(mean)


def test_a_window_too_short_for_one_block_counts_nothing(model):
    result = walk_acceptance(model, torch.zeros(2, 4, dtype=torch.long))
    assert result.blocks == 0
    assert math.isnan(result.mean_acceptance_length)
    assert result.to_json()["mean_acceptance_length"] is None
    assert walk_acceptance(model, torch.zeros(2, 5, dtype=torch.long)).blocks == 2


def test_the_walk_leaves_mode_and_random_state_as_they_were(model):
    model.train()
    state = torch.get_rng_state()
    walk_acceptance(model, torch.zeros(1, 8, dtype=torch.long))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_settings_name_their_limits(model):
    windows = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        walk_acceptance(model, windows, num_draft_tokens=4)
    with pytest.raises(ConfigError, match="rows_per_forward"):
        walk_acceptance(model, windows, rows_per_forward=0)
    with pytest.raises(DataError, match=r"\[batch, positions\]"):
        walk_acceptance(model, windows[0])
