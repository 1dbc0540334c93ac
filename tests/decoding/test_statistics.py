"""The statistics count what they say they count."""

from __future__ import annotations

import json
import math

import pytest
import torch

from decoding_cases import base_continuation, ragged_batch, script_drafts
from headway.decoding.executor import EagerExecutor
from headway.decoding.statistics import RowForward, acceptance_statistics
from tiny_models import random_tokens, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def _scripted(monkeypatch, truth, right):
    """Drafts of which the first `right[f]` are true in forward f after the prefill."""
    state = {"emitted": 0, "forward": 0}

    def draft(self, states, accepted, *, count, **_):
        state["emitted"] += accepted[0] + 1
        proposal = [*truth[state["emitted"] :], *[0] * count][:count]
        good = right[state["forward"]]
        state["forward"] += 1
        return torch.tensor([[token if place < good else (token + 1) % 40 for place, token in enumerate(proposal)]])

    monkeypatch.setattr(EagerExecutor, "draft", draft)


def test_lengths_rates_and_means_of_a_known_run(model, monkeypatch):
    row = random_tokens(1, 5)
    truth = base_continuation(model, row, 13)
    # 1 by the prefill; then 3, 1, 4, 2 by forwards of three drafts; two more by a last block that the limit shortens.
    _scripted(monkeypatch, truth, [2, 0, 3, 1, 3])
    result = model.generate(row, max_new_tokens=13, return_dict_in_generate=True)
    statistics = result.acceptance
    assert result.sequences[0, 5:].tolist() == truth
    assert statistics.lengths == [[3, 1, 4, 2, 2]]
    assert statistics.forwards.tolist() == [5]
    assert statistics.emitted_tokens.tolist() == [12]
    assert statistics.mean_acceptance_length == pytest.approx(12 / 5)
    # Offset 2: tried 5 times, right 4. Offset 3: tried where offset 2 was right and the block had it. Offset 4: 2, 1.
    assert statistics.acceptance_rate.tolist() == pytest.approx([4 / 5, 2 / 3, 1 / 2])


def test_an_end_token_cuts_what_is_counted(model, monkeypatch):
    row = random_tokens(1, 5)
    truth = base_continuation(model, row, 13)
    end = 2
    assert truth[end] not in truth[:end]
    _scripted(monkeypatch, truth, [3] * 5)
    result = model.generate(row, max_new_tokens=13, eos_token_id=truth[end], return_dict_in_generate=True)
    statistics = result.acceptance
    # All three drafts are right, but the end token is the second of the block: the third draft stands for no token.
    assert statistics.lengths == [[2]]
    assert statistics.acceptance_rate[:2].tolist() == [1.0, 1.0]
    assert math.isnan(statistics.acceptance_rate[2])
    assert statistics.mean_acceptance_length == 2.0


def test_offsets_that_were_never_drafted_have_no_rate(model):
    row = random_tokens(1, 5)
    plain = model.generate(row, max_new_tokens=6, num_draft_tokens=0, return_dict_in_generate=True).acceptance
    assert all(math.isnan(rate) for rate in plain.acceptance_rate)
    assert plain.mean_acceptance_length == 1.0
    one = model.generate(row, max_new_tokens=6, num_draft_tokens=1, return_dict_in_generate=True).acceptance
    assert [math.isnan(rate) for rate in one.acceptance_rate] == [False, True, True]
    alone = model.generate(row, max_new_tokens=1, return_dict_in_generate=True).acceptance
    assert math.isnan(alone.mean_acceptance_length)
    assert alone.lengths == [[]]
    assert alone.forwards.tolist() == alone.emitted_tokens.tolist() == [0]


def test_idle_rows_are_not_counted(model, monkeypatch):
    batch = ragged_batch([4, 7, 2], "lrl")
    truth = [base_continuation(model, row, 20) for row in batch.rows()]
    script_drafts(monkeypatch, truth)
    result = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=20,
        eos_token_id=truth[1][2],
        return_dict_in_generate=True,
    )
    statistics = result.acceptance
    assert statistics.forwards.tolist() == [len(row) for row in statistics.lengths]
    assert statistics.emitted_tokens.tolist() == [sum(row) for row in statistics.lengths]
    assert statistics.forwards[1] < max(statistics.forwards.tolist())
    assert all(length >= 1 for row in statistics.lengths for length in row)
    assert statistics.mean_acceptance_length == pytest.approx(
        int(statistics.emitted_tokens.sum()) / int(statistics.forwards.sum())
    )


def test_rows_are_pooled_and_not_averaged():
    rows = [
        [RowForward([1, 2], drafted=2, accepted=1)],
        [RowForward([1], drafted=1, accepted=0), RowForward([1], drafted=1, accepted=0)],
    ]
    statistics = acceptance_statistics(rows, num_future_tokens=3)
    assert statistics.acceptance_rate.tolist() == pytest.approx([1 / 3, 0.0])
    assert statistics.mean_acceptance_length == pytest.approx(4 / 3)


def test_they_are_json():
    statistics = acceptance_statistics([[]], num_future_tokens=3, interrupted=True)
    assert json.loads(json.dumps(statistics.to_dict(), allow_nan=False)) == {
        "mean_acceptance_length": None,
        "acceptance_rate": [None, None],
        "forwards": [0],
        "emitted_tokens": [0],
        "lengths": [[]],
        "interrupted": True,
    }


def test_the_result_is_a_model_output_whose_first_item_is_the_sequences(model):
    result = model.generate(random_tokens(1, 5), max_new_tokens=4, return_dict_in_generate=True)
    assert result[0] is result.sequences is result["sequences"]
    assert result.num_new_tokens.tolist() == [4]
