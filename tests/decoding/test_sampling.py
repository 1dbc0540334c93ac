"""Sampling draws one token per forward from the model's own distribution, and the result says so."""

from __future__ import annotations

import pytest
import torch

from decoding_cases import ragged_batch
from tiny_models import random_tokens, tiny_model

SETTINGS = {
    "temperature 1": {"top_k": 0},
    "temperature, top-k, top-p": {"temperature": 0.7, "top_k": 10, "top_p": 0.9},
    "repetition penalty": {"top_k": 0, "repetition_penalty": 1.4},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_seed_draws_the_tokens_that_the_base_draws(batch, setting, model):
    tokens = random_tokens(batch, 6)
    options = {"do_sample": True, "max_new_tokens": 16} | SETTINGS[setting]
    torch.manual_seed(11)
    expected = model.base.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
    torch.manual_seed(11)
    result = model.generate(tokens, return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, expected)


def test_samples_follow_the_models_distribution(model):
    draws, row = 4000, random_tokens(1, 5)
    with torch.no_grad():
        probabilities = model(row).logits[0, -1].softmax(-1)
    torch.manual_seed(1)
    out = model.generate(row, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=draws)
    assert out.shape == (draws, 6)
    counts = torch.bincount(out[:, 5], minlength=40).double()
    expected = probabilities.double() * draws
    cells = expected > 5
    chi_square = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    degrees = int(cells.sum()) - 1
    # Mean and deviation of chi-square are k and sqrt(2k): five deviations are left to chance.
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_the_result_says_that_it_was_sampled_plainly(model):
    row = random_tokens(1, 5)
    result = model.generate(row, do_sample=True, max_new_tokens=4, return_dict_in_generate=True)
    assert result.mode == "plain"
    assert "do_sample=True" in result.note
    assert result.acceptance.lengths == [[1, 1, 1]]
    greedy = model.generate(row, max_new_tokens=4, return_dict_in_generate=True)
    assert (greedy.mode, greedy.note) == ("self-speculative", None)
    asked = model.generate(row, do_sample=True, max_new_tokens=4, num_draft_tokens=0, return_dict_in_generate=True)
    assert (asked.mode, asked.note) == ("plain", None)


def test_samples_of_padded_prompts_keep_the_prompts_as_given(model):
    batch = ragged_batch([3, 6], "lr")
    out = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, max_new_tokens=5, num_return_sequences=2
    )
    assert torch.equal(out[:, :6], batch.input_ids.repeat_interleave(2, dim=0))
