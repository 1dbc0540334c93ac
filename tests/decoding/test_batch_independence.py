"""The same seed gives a row the same text whatever else is in the batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from decoding_cases import Batch, near_ties, new_tokens, ragged_batch, script_drafts
from head_cases import head_model
from headway.decoding.lean.few_rows import kernel_for
from tiny_models import VOCABULARY, tiny_model

NEW = 10
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.95, "max_new_tokens": NEW}
LENGTHS = [7, 2, 11, 5, 1, 9, 4, 6]
DRAFTS: dict[str, dict[str, Any]] = {
    "plain": {"num_draft_tokens": 0},
    "chain": {},
    "chain, lean": {"executor": "lean"},
    "tree": {"tree": 9},
    "copied": {"drafts": "lookup"},
    "drawn": {"sample_drafts": True},
    "drawn tree": {"sample_drafts": True, "tree": 6},
    "pieces": {"prefill_chunk_tokens": 3},
}


def texts(model: Any, batch: Batch, seeds: list[int], **options: Any) -> list[list[int]]:
    """New tokens of every row."""
    result = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        pad_token_id=0,
        return_dict_in_generate=True,
        seed=seeds,
        **(SAMPLING | options),
    )
    return new_tokens(result, batch.input_ids.shape[1])


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows, in that order, with no more columns than they need."""
    lengths = batch.attention_mask[rows].sum(dim=1).tolist()
    picked = Batch(torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths)).long())
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        # On the other side than in the whole batch.
        left = bool(batch.attention_mask[row, 0])
        columns = slice(max(lengths) - length, None) if left else slice(0, length)
        picked.input_ids[place, columns] = batch.input_ids[row][batch.attention_mask[row].bool()]
        picked.attention_mask[place, columns] = 1
    return picked


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("transformer", torch.float64),
        ("transformer-markov", torch.float32),
        ("medusa", torch.float32),
        ("sequential", torch.float32),
    ],
)
def test_a_row_is_the_same_alone_and_among_any_neighbours(architecture: str, dtype: torch.dtype):
    model = head_model(architecture, "qwen3", dtype=dtype)
    batch = ragged_batch(LENGTHS, "lrlrlrlr", seed=30)
    seeds = [100 + 7 * row for row in range(len(LENGTHS))]
    alone = [texts(model, rows_of(batch, [row]), [seeds[row]])[0] for row in range(len(LENGTHS))]
    assert len({tuple(text) for text in alone}) == len(alone)
    rng = random.Random(0)
    for count in (2, 3, 4, 6, 8):
        rows = rng.sample(range(len(LENGTHS)), count)
        together = texts(model, rows_of(batch, rows), [seeds[row] for row in rows])
        assert together == [alone[row] for row in rows]


@pytest.mark.parametrize("drafts", DRAFTS)
def test_neighbours_change_nothing_however_a_row_is_drafted(drafts: str):
    model = tiny_model("llama", dtype=torch.float32)
    batch = ragged_batch(LENGTHS, "rlrlrlrl", seed=60)
    seeds = list(range(len(LENGTHS)))
    alone = [texts(model, rows_of(batch, [row]), [seeds[row]], **DRAFTS[drafts])[0] for row in range(len(LENGTHS))]
    rng = random.Random(drafts)
    for count in (2, 5, 7):
        rows = rng.sample(range(len(LENGTHS)), count)
        together = texts(model, rows_of(batch, rows), [seeds[row] for row in rows], **DRAFTS[drafts])
        assert together == [alone[row] for row in rows]


def test_neighbours_that_end_or_were_given_other_ends_change_nothing():
    model = tiny_model("llama", dtype=torch.float32)
    batch = ragged_batch(LENGTHS, "l" * 8, seed=90)
    seeds = list(range(8))
    ends = {"eos_token_id": [3, 11, 17, 23, 29, 31]}
    alone = [texts(model, rows_of(batch, [row]), [seeds[row]], **ends)[0] for row in range(8)]
    assert len({len(text) for text in alone}) > 2
    assert texts(model, batch, seeds, **ends) == alone


def test_one_prompt_with_one_seed_is_one_text_in_every_row():
    model = tiny_model("llama", dtype=torch.float32)
    batch = ragged_batch([6] * 5, "lllll", seed=3)
    batch.input_ids[:] = batch.input_ids[0]
    first, *others = texts(model, batch, [9] * 5)
    assert others == [first] * 4


@pytest.mark.skipif(kernel_for(torch.zeros(1, 1)) is None, reason="no C++ compiler for the kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_the_prompt_the_kernel_gives_a_row_the_same_bits_among_any_neighbours(dtype, monkeypatch):
    # Prompts are read by large products, whose rounding depends on the batch: prompts of one token are read by the kernel.
    model = tiny_model("qwen3", dtype=dtype)
    batch = Batch(torch.arange(1, 9)[:, None] % VOCABULARY, torch.ones(8, 1, dtype=torch.long))
    options = {"do_sample": False, "max_new_tokens": NEW, "executor": "lean", "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    together = model.generate(batch.input_ids, num_draft_tokens=0, **options)
    truth = new_tokens(together, 1)
    for row in range(8):
        with monkeypatch.context() as patch:
            script_drafts(patch, [truth[row]], seed=row)
            alone = model.generate(batch.input_ids[row : row + 1], **options)
        assert new_tokens(alone, 1) == [truth[row]]
        if dtype == torch.float32:
            assert near_ties(model, batch.rows()[row : row + 1], new_tokens(alone, 1), [truth[row]]) == 0
