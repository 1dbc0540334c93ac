"""Self-speculative greedy text is the plain greedy text, in every family, alone and in ragged batches."""

from __future__ import annotations

import pytest
import torch

from decoding_cases import base_continuation, near_ties, new_tokens, ragged_batch, script_drafts
from tiny_models import FAMILIES, random_tokens, tiny_model

NEW = 24
SINGLE = ragged_batch([9], "l")
# Lengths below and above the sliding window of 6; padding on both sides in one batch.
RAGGED = ragged_batch([3, 11, 7, 1], "lrrl")
ATTENTIONS = [(family, "eager" if family == "gemma2" else "sdpa") for family in FAMILIES] + [
    ("llama", "eager"),
    ("mistral-sliding", "eager"),
    ("gemma3_text", "eager"),
]


def _model(family, attention, dtype):
    model = tiny_model(family, dtype=dtype)
    model.base.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS, ids=["-".join(pair) for pair in ATTENTIONS])
def test_every_acceptance_gives_the_tokens_of_plain_decoding_and_of_the_base(family, attention, dtype, monkeypatch):
    model = _model(family, attention, dtype)
    lengths = set()
    for batch in (SINGLE, RAGGED):
        rows = batch.rows()
        expected = [base_continuation(model, row, NEW) for row in rows]
        options = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW, "return_dict_in_generate": True}
        columns = batch.input_ids.shape[1]
        plain = model.generate(batch.input_ids, num_draft_tokens=0, **options)
        heads = model.generate(batch.input_ids, **options)
        with monkeypatch.context() as patch:
            script_drafts(patch, expected)
            scripted = model.generate(batch.input_ids, **options)
        for result in (plain, heads, scripted):
            assert torch.equal(result.sequences[:, :columns], batch.input_ids)
            differing = near_ties(model, rows, new_tokens(result, columns), expected)
            assert differing == 0 or dtype == torch.float32
        lengths.update(length for row in scripted.acceptance.lengths for length in row)
    assert lengths == {1, 2, 3, 4}


def _train(model, steps=70):
    """A few steps on text made of five words, so that heads guess well at times and badly at others."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 40, (5, 6), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(steps):
        picks = torch.randint(0, 5, (8, 6), generator=generator)
        text = words[picks].flatten(1)
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def trained(request):
    return _train(tiny_model(request.param))


def test_a_trained_models_own_heads_reach_every_acceptance_and_change_nothing(trained):
    batch = ragged_batch([4, 9, 6, 2, 8, 5], "lrlrlr", seed=5)
    rows = batch.rows()
    expected = [base_continuation(trained, row, 60) for row in rows]
    result = trained.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=60, return_dict_in_generate=True
    )
    assert near_ties(trained, rows, new_tokens(result, 9), expected) <= 1
    assert {length for row in result.acceptance.lengths for length in row} == {1, 2, 3, 4}
    assert result.acceptance.mean_acceptance_length > 1.5
    alone = [trained.generate(row, max_new_tokens=60)[0, row.shape[1] :].tolist() for row in rows]
    assert near_ties(trained, rows, alone, expected) <= 1


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_num_draft_tokens_limits_the_block_and_not_the_text(drafts, monkeypatch):
    model = tiny_model()
    expected = [base_continuation(model, row, NEW) for row in RAGGED.rows()]
    script_drafts(monkeypatch, expected, wrong=0.1)
    result = model.generate(
        RAGGED.input_ids,
        attention_mask=RAGGED.attention_mask,
        max_new_tokens=NEW,
        num_draft_tokens=drafts,
        return_dict_in_generate=True,
    )
    assert new_tokens(result, RAGGED.input_ids.shape[1]) == expected
    assert max(length for row in result.acceptance.lengths for length in row) == drafts + 1
    assert result.mode == ("self-speculative" if drafts else "plain")


def test_plain_decoding_never_runs_a_head():
    model = tiny_model()

    def explode(*args, **kwargs):
        raise AssertionError("a head was run")

    for head in model.heads:
        head.forward = explode
    tokens = random_tokens(2, 5)
    assert model.generate(tokens, max_new_tokens=5, num_draft_tokens=0).shape == (2, 10)


def test_one_future_token_decodes_as_the_base():
    model = tiny_model(num_future_tokens=1)
    row = random_tokens(1, 6)
    result = model.generate(row, max_new_tokens=12, return_dict_in_generate=True)
    assert new_tokens(result, 6) == [base_continuation(model, row, 12)]
    assert result.mode == "plain"
    assert result.note is None


def test_a_batch_of_equal_lengths_without_a_mask_equals_its_rows():
    model = tiny_model()
    tokens = random_tokens(3, 8, seed=4)
    out = model.generate(tokens, max_new_tokens=NEW)
    for row, text in zip(tokens, out, strict=True):
        assert text[8:].tolist() == base_continuation(model, row[None], NEW)


def test_bfloat16_decodes():
    model = tiny_model(dtype=torch.bfloat16)
    for batch in (SINGLE, RAGGED):
        out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=8)
        assert out.shape == (batch.input_ids.shape[0], batch.input_ids.shape[1] + 8)


def test_autocast_decodes():
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.generate(RAGGED.input_ids, attention_mask=RAGGED.attention_mask, max_new_tokens=8)
    assert out.shape[1] == RAGGED.input_ids.shape[1] + 8
