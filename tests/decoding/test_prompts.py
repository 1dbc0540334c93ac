"""Padding is what the mask says, wherever it is."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding_cases import base_continuation, ragged_batch
from headway.decoding.prompts import align_prompts, pad_left
from headway.errors import DecodingError
from tiny_models import random_tokens, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=1, max_size=4))
def test_alignment_keeps_every_token_in_order(masks):
    mask = torch.tensor(masks).long()
    ids = torch.arange(1, mask.numel() + 1).reshape(mask.shape)
    prompts = align_prompts(ids, mask, vocabulary=100)
    assert prompts.lengths == mask.sum(dim=1).tolist()
    assert prompts.ids_BP.shape[1] == max(prompts.lengths)
    for row, keep, aligned, length in zip(ids, mask, prompts.ids_BP, prompts.lengths, strict=True):
        assert aligned[:length].tolist() == row[keep.bool()].tolist()
        assert set(aligned[length:].tolist()) <= {int(aligned[length - 1])}
    left_ids, left_mask = pad_left(ids, mask)
    for row, keep, before, before_mask in zip(left_ids, left_mask, ids, mask, strict=True):
        assert keep[-1] == 1
        assert row[keep.bool()].tolist() == before[before_mask.bool()].tolist()
        assert sorted(row.tolist()) == sorted(before.tolist())


def test_the_side_of_the_padding_does_not_matter(model, caplog):
    left, right = ragged_batch([3, 8, 5], "lll"), ragged_batch([3, 8, 5], "rrr")
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    with caplog.at_level(logging.WARNING):
        one = model.generate(left.input_ids, attention_mask=left.attention_mask, **options)
        other = model.generate(right.input_ids, attention_mask=right.attention_mask, **options)
    assert torch.equal(one[:, 8:], other[:, 8:])
    assert torch.equal(other[:, :8], right.input_ids)
    assert "right-padding" not in caplog.text


def test_without_a_mask_pad_ids_are_padding_as_in_transformers(model, caplog):
    batch = ragged_batch([3, 8, 5], "lrl", seed=9)
    ids = batch.input_ids.clone()
    ids[batch.attention_mask.bool()] = ids[batch.attention_mask.bool()].clamp(min=1)
    with caplog.at_level(logging.WARNING):
        out = model.generate(ids, max_new_tokens=10, pad_token_id=0)
    assert "right-padding" not in caplog.text
    for row, keep, text in zip(ids, batch.attention_mask, out, strict=True):
        assert text[8:].tolist() == base_continuation(model, row[keep.bool()][None], 10)


def test_a_pad_id_inside_a_prompt_without_a_mask_is_left_out_as_transformers_does_and_logged(model, caplog):
    row = torch.tensor([[5, 9, 0, 7, 3]])
    with caplog.at_level(logging.WARNING, logger="headway"):
        out = model.generate(row, max_new_tokens=10, pad_token_id=0)
    assert torch.equal(out, model.base.generate(row, max_new_tokens=10, pad_token_id=0, do_sample=False))
    assert "attention_mask=torch.ones_like(input_ids)" in caplog.text
    caplog.clear()
    kept = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=10, pad_token_id=0)
    assert kept[0, 5:].tolist() == base_continuation(model, row, 10)
    assert caplog.text == ""


def test_a_pad_id_that_is_also_an_end_id_is_a_token_where_no_mask_is_given(model):
    row = torch.tensor([[5, 9, 2, 7, 2]])
    out = model.generate(row, max_new_tokens=10, pad_token_id=2, eos_token_id=[1, 2])
    assert out[0, 5:].tolist() == base_continuation(model, row, 10, pad_token_id=2, eos_token_id=[1, 2])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "at least one token"),
        (torch.zeros(0, 3, dtype=torch.long), None, "at least one token"),
        (torch.tensor([1, 2, 3]), None, r"\[batch, positions\]"),
        (torch.rand(1, 3), None, "whole numbers"),
        ([[1, 2, 3]], None, "tensor"),
        (torch.tensor([[1, 40]]), None, r"0\.\.39: got 40"),
        (torch.tensor([[1, -1]]), None, "got -1"),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]), "row 1 .* has no token"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 1, 1]]), "shape of input_ids"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_with_the_fix(ids, mask, message, model):
    with pytest.raises(DecodingError, match=message):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_padding_ids_may_lie_outside_the_vocabulary(model):
    row, padded = torch.tensor([[4, 5]]), torch.tensor([[-1, 4, 5, 999]])
    out = model.generate(padded, attention_mask=torch.tensor([[0, 1, 1, 0]]), max_new_tokens=6)
    assert out[0, 4:].tolist() == base_continuation(model, row, 6)


def test_no_prompt_starts_from_the_bos_token(model):
    out = model.generate(bos_token_id=7, max_new_tokens=5)
    assert out[0].tolist() == [7, *base_continuation(model, torch.tensor([[7]]), 5)]


def test_ids_may_be_int32_and_come_back_as_int64(model):
    row = random_tokens(1, 4)
    out = model.generate(row.int(), max_new_tokens=5)
    assert out.dtype == torch.long
    assert torch.equal(out, model.generate(row, max_new_tokens=5))
