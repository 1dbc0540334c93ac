"""Reduced precision: bit-equal decoding on the lean kernel, elsewhere a report that explains."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from decoding_cases import new_tokens, ragged_batch, script_drafts
from headway.decoding.lean.few_rows import kernel_for
from headway.decoding.near_tie import NARROW_UNITS, Difference, differences, explain
from tiny_models import random_tokens, tiny_model

needs_kernel = pytest.mark.skipif(
    kernel_for(torch.zeros(1, 1)) is None, reason="no C++ compiler for the kernel, on which the promise rests"
)
ON_THE_KERNEL = ["llama", "llama-gqa-tied", "mistral-sliding", "qwen2", "qwen3", "qwen3-sliding", "phi3"]
"""Pre-norm families: their decoder layers run in the kernel."""

NEW = 16


def both_ways(model, batch, monkeypatch, *, drafts, executor, spoilt=0, **request):
    """Plain and drafted results of one batch; drafts are the plain text with some tokens spoilt."""
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": NEW, "pad_token_id": 0, "executor": executor}
    options |= {"return_dict_in_generate": True, "do_sample": False, **request}
    plain = model.generate(batch.input_ids, num_draft_tokens=0, **options)
    truth = new_tokens(plain, batch.input_ids.shape[1])
    with monkeypatch.context() as patch:
        if not drafts:
            script_drafts(patch, truth, seed=spoilt)
        return plain, model.generate(batch.input_ids, **drafts, **options)


@needs_kernel
@pytest.mark.parametrize("family", ON_THE_KERNEL)
def test_bfloat16_chains_on_the_kernel_are_bit_equal_to_one_token_at_a_time(family: str, monkeypatch):
    model = tiny_model(family, dtype=torch.bfloat16)
    accepted = 0
    for seed, rows in enumerate((1, 2, 4, 8, 8, 8)):  # 8 rows of 4 positions are the 32 rows that the kernel takes
        lengths = [1 + (5 * row + 3 * seed) % 11 for row in range(rows)]
        batch = ragged_batch(lengths, ("lr" * rows)[:rows], seed=100 * seed)
        plain, drafted = both_ways(
            model, batch, monkeypatch, drafts={}, executor="lean", spoilt=seed, output_logits=True
        )
        assert drafted.note is None
        assert torch.equal(drafted.sequences, plain.sequences)
        same = [torch.equal(one, other) for one, other in zip(plain.logits, drafted.logits, strict=True)]
        assert all(same), f"logits of new token {same.index(False)} differ"
        accepted += sum(drafted.acceptance.accepted)
    assert accepted > 100


@needs_kernel
def test_copied_drafts_and_sampling_on_the_kernel_are_bit_equal_in_bfloat16(monkeypatch):
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    for seed in range(6):
        batch = ragged_batch([9, 3, 6], "lrl", seed=seed)
        batch.input_ids[:] = batch.input_ids % 3 + 1
        for request in ({}, {"do_sample": True, "seed": seed, "temperature": 0.7}):
            plain, drafted = both_ways(
                model, batch, monkeypatch, drafts={"drafts": "lookup"}, executor="lean", **request
            )
            assert torch.equal(drafted.sequences, plain.sequences)


@pytest.mark.parametrize(
    ("dtype", "drafts", "executor"),
    [
        (torch.bfloat16, {}, "eager"),
        (torch.float16, {}, "eager"),
        (torch.bfloat16, {"tree": 8}, "eager"),
        (torch.bfloat16, {"tree": 8}, "lean"),
    ],
)
def test_where_bits_differ_every_difference_is_explained_by_rounding(dtype, drafts, executor, monkeypatch):
    # Many near-ties: few distinct logits, of small size.
    models = [tiny_model("llama", dtype=dtype, seed=seed) for seed in (1, 2)]
    found: list[Difference] = []
    for seed, model in enumerate(models):
        batch = ragged_batch([4, 9, 2, 7, 5, 3, 8, 6], "lrlrlrlr", seed=50 * seed)
        results = both_ways(
            model,
            batch,
            monkeypatch,
            drafts=drafts,
            executor=executor,
            seed=seed,
            output_scores=True,
            output_logits=True,
        )
        found += differences(*results, dtype=dtype)
    assert [report.sentence() for report in found if report.verdict != "near-tie"] == []


def test_a_wrong_mask_is_not_explained(monkeypatch):
    from headway.decoding.executor import EagerExecutor

    model = tiny_model("llama", dtype=torch.bfloat16)
    run = EagerExecutor._run

    def spoilt(self, ids, mask, position_ids, *args, **kwargs):
        if mask is not None and ids.shape[1] > 1:
            mask = mask.clone()
            mask[..., 0] = torch.finfo(mask.dtype).min  # the first token of a text is hidden from blocks
        return run(self, ids, mask, position_ids, *args, **kwargs)

    monkeypatch.setattr(EagerExecutor, "_run", spoilt)
    batch = ragged_batch([4, 9, 2, 7], "lrlr")
    results = both_ways(model, batch, monkeypatch, drafts={}, executor="eager", output_scores=True, output_logits=True)
    verdicts = [report.verdict for report in differences(*results, dtype=torch.bfloat16)]
    assert "not explained" in verdicts


def test_a_report_names_the_place_the_tokens_and_the_distance():
    plain, other = torch.tensor([1.0, 3.0, 2.99]), torch.tensor([1.0, 2.99, 3.0])
    report = explain(1, 2, scores=(plain, other), logits=(plain, other), dtype=torch.bfloat16, row=4, position=7)
    assert (report.row, report.position, report.expected, report.found) == (4, 7, 1, 2)
    assert report.expected_logits == pytest.approx((3.0, 2.99))
    assert report.found_logits == pytest.approx((2.99, 3.0))
    assert report.gap == pytest.approx(0.01, rel=1e-3)
    assert report.unit == 3.0 * 2**-7
    assert report.gap_in_units == pytest.approx(0.01 / report.unit, rel=1e-3)
    assert report.verdict == "near-tie"
    assert json.loads(json.dumps(report.to_json())) == {**dataclasses.asdict(report), **_lists(report)}
    assert report.sentence().startswith("row 4, new token 8: 2 instead of 1; their logits differ by 0.01")
    wide = explain(1, 2, scores=(plain, other), logits=(plain, other), dtype=torch.float32)
    assert wide.verdict == "not explained"


def _lists(report: Difference) -> dict[str, list[float]]:
    return {name: list(getattr(report, name)) for name in ("expected_logits", "found_logits")}


def test_a_drawn_token_is_a_near_tie_where_its_number_lies_at_the_edge_of_a_share():
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0])
    near = explain(0, 1, scores=(logits, logits), logits=(logits, logits), dtype=torch.float32, uniform=0.25 - 1e-6)
    far = explain(0, 1, scores=(logits, logits), logits=(logits, logits), dtype=torch.float32, uniform=0.2)
    assert (near.verdict, far.verdict) == ("near-tie", "not explained")
    assert near.gap == pytest.approx(1e-6, rel=1e-3)
    assert far.gap == pytest.approx(0.05)
    assert near.gap_in_units is None


def test_logits_that_disagree_are_no_near_tie_however_small_the_gap():
    plain, other = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0 + 1.1 * NARROW_UNITS * 2**-7])
    report = explain(0, 1, scores=(plain, other), logits=(plain, other), dtype=torch.bfloat16)
    assert report.gap == 0.0
    assert report.verdict == "not explained"


def test_a_text_that_ends_earlier_is_a_difference_without_logits():
    model = tiny_model("llama")
    request = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    row = random_tokens(1, 5)
    whole = model.generate(row, **request)
    short = model.generate(row, **request | {"max_new_tokens": 3})
    (report,) = differences(whole, short, dtype=torch.float32)
    assert (report.position, report.found, report.verdict) == (3, None, "not explained")
    with pytest.raises(ValueError, match="output_scores=True"):
        differences(model.generate(row, max_new_tokens=3, return_dict_in_generate=True), short, dtype=torch.float32)
