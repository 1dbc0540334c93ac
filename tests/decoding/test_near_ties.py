"""Reduced precision: bit-equal decoding on the lean kernel, elsewhere a report that explains."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from decoding_cases import new_tokens, ragged_batch, script_drafts
from headway.decoding.executor import EagerExecutor
from headway.decoding.lean.executor import LeanExecutor
from headway.decoding.lean.few_rows import kernel_for
from headway.decoding.near_tie import NARROW_UNITS, WIDE_UNITS, Difference, differences, explain
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


ROUNDED = [
    (torch.bfloat16, {}, "eager"),
    (torch.float16, {}, "eager"),
    (torch.float32, {}, "eager"),
    (torch.bfloat16, {"tree": 8}, "eager"),
    (torch.bfloat16, {"tree": 8}, "lean"),
    (torch.float32, {"tree": 8}, "lean"),
]


def twin_model(*, dtype, seed):
    """A model whose tokens 2i and 2i + 1 are one rounding apart at every place of every text."""
    model = tiny_model("llama", dtype=dtype, seed=seed)
    weight_VD = model.base.lm_head.weight.data
    weight_VD[1::2] = weight_VD[::2] * (1 + torch.finfo(dtype).eps)
    return model


def disturb_blocks(monkeypatch, executor, *, units, lifted=False):
    """Let the logits of blocks be off by up to so many roundings at random; or those of even tokens too high by so many."""
    owner = {"eager": EagerExecutor, "lean": LeanExecutor}[executor]
    right, generator = owner.logits, torch.Generator().manual_seed(5)

    def disturbed(self, last_hidden_BMD):
        logits_BMV = right(self, last_hidden_BMD)
        if logits_BMV.shape[1] == 1:
            return logits_BMV
        off_BMV = 2 * torch.rand(logits_BMV.shape, generator=generator) - 1
        if lifted:
            off_BMV = 1 - torch.arange(logits_BMV.shape[-1]) % 2
        step_BM1 = units * torch.finfo(logits_BMV.dtype).eps * logits_BMV.float().abs().amax(dim=-1, keepdim=True)
        return (logits_BMV.float() + step_BM1 * off_BMV).to(logits_BMV.dtype)

    monkeypatch.setattr(owner, "logits", disturbed)


def reports_of(model, monkeypatch, *, dtype, drafts, executor, seed=0):
    """How drafted generations of eight prompts differ from plain ones."""
    batch = ragged_batch([4, 9, 2, 7, 5, 3, 8, 6], "lrlrlrlr", seed=50 * seed)
    recorded = {"output_scores": True, "output_logits": True}
    results = both_ways(model, batch, monkeypatch, drafts=drafts, executor=executor, spoilt=seed, **recorded)
    return differences(*results, dtype=dtype)


@pytest.mark.parametrize(("dtype", "drafts", "executor"), ROUNDED)
def test_where_bits_differ_every_difference_is_explained_by_rounding(dtype, drafts, executor, monkeypatch):
    # Whether any rounding of this machine falls on a near-tie is chance: the next test makes sure of it.
    model = twin_model(dtype=dtype, seed=1)
    found = reports_of(model, monkeypatch, dtype=dtype, drafts=drafts, executor=executor)
    assert [report.sentence() for report in found if report.verdict != "near-tie"] == []


@pytest.mark.parametrize(("dtype", "drafts", "executor"), ROUNDED)
def test_differences_that_rounding_makes_are_seen_and_each_is_explained(dtype, drafts, executor, monkeypatch):
    disturb_blocks(monkeypatch, executor, units=1)
    model = twin_model(dtype=dtype, seed=1)
    found = reports_of(model, monkeypatch, dtype=dtype, drafts=drafts, executor=executor)
    assert len(found) >= 4, "hardly any of the eight rows met a near-tie: this test shows nothing"
    assert [report.sentence() for report in found if report.verdict != "near-tie"] == []
    assert all(report.expected != report.found and report.deviation > 0 for report in found)
    assert any(report.expected // 2 == report.found // 2 and report.gap > 0 for report in found)


@pytest.mark.parametrize(("dtype", "drafts", "executor"), ROUNDED)
def test_near_ties_that_a_mistake_decides_are_seen_and_not_explained_away(dtype, drafts, executor, monkeypatch):
    # By the gap alone every one of them would pass: the chosen twins are one rounding apart.
    limit = WIDE_UNITS if dtype == torch.float32 else NARROW_UNITS
    disturb_blocks(monkeypatch, executor, units=2 * limit, lifted=True)
    model = twin_model(dtype=dtype, seed=1)
    found = reports_of(model, monkeypatch, dtype=dtype, drafts=drafts, executor=executor)
    twins = [report for report in found if (report.expected, report.found) == (report.found + 1, report.found)]
    assert twins, "no choice between twins was changed: this test shows nothing"
    assert max(report.gap_in_units for report in twins) <= 4
    assert [report.sentence() for report in found if report.verdict != "not explained"] == []


def test_a_wrong_mask_is_not_explained(monkeypatch):
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
