"""Whoever else is being decoded, a request gets what it gets alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoding_cases import near_ties
from head_cases import CHANGES_BASE, head_model
from headway.decoding.cache import RaggedCache
from headway.decoding.requests import Request
from headway.decoding.scheduler import Scheduler
from scheduler_cases import alone, requests, script, serve
from tiny_models import random_tokens, tiny_model

OPTIONS = {
    "chain": {},
    "tree": {"tree": 7},
    "dynamic-tree": {"tree": "dynamic", "tree_nodes": 5},
    "lookup": {"drafts": "lookup"},
    "heads+lookup": {"drafts": "heads+lookup", "tree": 5},
    "drawn": {"sample_drafts": True},
    "plain": {"num_draft_tokens": 0},
    "auto": {"num_draft_tokens": "auto"},
    "lean": {"executor": "lean"},
    "lean-tree": {"executor": "lean", "tree": 7},
    "pieces": {"prefill_chunk_tokens": 4},
}
KINDS_OF_HEADS = (
    "transformer",
    "causal-2-layers-markov",
    "anticausal",
    "linear-tap-markov",
    "replicated",
    "medusa",
    "hydra",
    "sequential",
    "sequential-fused-shared",
)
FAMILIES = ("llama", "qwen3-sliding", "gemma3_text", "gpt2")
QUIET = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

arrivals = st.lists(st.tuples(st.integers(0, 4), requests()), min_size=2, max_size=6)


@cache
def _model(family="llama", dtype=torch.float64):
    return tiny_model(family, dtype=dtype)


def _expected(model, request, completion, drafts):
    """The text of the request alone, as far as it got; reasons included."""
    text = alone(model, request, **drafts)
    if completion.finish_reason == "cancelled":
        return text[: len(completion.tokens)]
    ends = text[-1] in request.end_token_ids or any(text[-len(stop) :] == list(stop) for stop in request.stop_sequences)
    assert completion.finish_reason == ("stop" if ends else "length")
    return text


@pytest.mark.parametrize("options", OPTIONS)
@QUIET
@given(
    arrivals=arrivals,
    cancel=st.dictionaries(st.integers(0, 5), st.integers(0, 9), max_size=2),
    rows=st.integers(1, 4),
    family=st.sampled_from(FAMILIES),
)
def test_random_arrivals_and_cancellations_leave_every_text_as_it_is_alone(options, arrivals, cancel, rows, family):
    model = _model("llama" if "lean" in options else family)
    scheduler = Scheduler(model, max_rows=rows, **OPTIONS[options])
    for (_, request), completion in zip(arrivals, serve(scheduler, arrivals, cancel=cancel), strict=True):
        assert completion.error is None
        # Drawn drafts keep the law of a text but not the text of a seed.
        drafts = OPTIONS[options] if options == "drawn" and request.sampled else {}
        assert completion.tokens == _expected(model, request, completion, drafts)
        assert completion.finish_reason != "cancelled" or completion.id in cancel
    assert scheduler.statistics.cache_tokens_allocated == 0
    assert scheduler.statistics.finished == len(arrivals)


def _different(asked):
    return list({request.prompt: request for _, request in asked}.values())


def _drafted_alone(model, asked, options, monkeypatch):
    with monkeypatch.context() as patch:
        seen = script(patch, model, asked)
        lengths = {}
        for request in asked:
            completion = Scheduler(model, max_rows=1, **options).generate([request])[0]
            assert completion.tokens == alone(model, request)
            lengths[request.prompt] = completion.acceptance.lengths
    return seen, lengths


@pytest.mark.parametrize(
    ("architecture", "options"), [*((name, {}) for name in KINDS_OF_HEADS), ("sequential", {"tree": 7})], ids=str
)
@settings(QUIET, max_examples=2)
@given(asked=st.lists(st.tuples(st.integers(0, 3), requests()), min_size=3, max_size=5))
def test_heads_of_every_kind_draft_what_they_draft_alone(architecture, options, asked, monkeypatch):
    model = _head_model(architecture)
    asked = _different(asked)
    seen, lengths = _drafted_alone(model, asked, options, monkeypatch)
    with monkeypatch.context() as patch:
        together = script(patch, model, asked)
        scheduler = Scheduler(model, max_rows=3, **options)
        completions = serve(scheduler, [(place % 3, request) for place, request in enumerate(asked)])
    for request, completion in zip(asked, completions, strict=True):
        assert completion.tokens == alone(model, request)
        assert completion.acceptance.lengths == lengths[request.prompt]
    for prompt, places in seen.items():
        for made, drafts in places.items():
            # A batch whose rows have little room drafts less.
            assert together[prompt][made][: len(drafts)] == drafts[: len(together[prompt][made])]


@cache
def _head_model(architecture):
    kind = {"allow_base_change": True} if architecture in CHANGES_BASE else {}
    return head_model(architecture, dtype=torch.float64, **kind)


@pytest.mark.parametrize("options", ["chain", "tree", "lean", "lean-tree", "pieces"])
@settings(QUIET, max_examples=2)
@given(asked=st.lists(st.tuples(st.integers(0, 3), requests(longest=20)), min_size=3, max_size=5))
def test_accepted_drafts_move_every_row_as_it_moves_alone(options, asked, monkeypatch):
    model, asked = _model(), _different(asked)
    _, lengths = _drafted_alone(model, asked, OPTIONS[options], monkeypatch)
    with monkeypatch.context() as patch:
        script(patch, model, asked)
        scheduler = Scheduler(model, max_rows=3, **OPTIONS[options])
        completions = serve(scheduler, [(place % 2, request) for place, request in enumerate(asked)])
    for request, completion in zip(asked, completions, strict=True):
        assert completion.tokens == alone(model, request)
        assert completion.acceptance.lengths == lengths[request.prompt]


def _difference_of_caches(scheduler, model):
    """Over keys and values of base and heads at every known position of every row under way; how many rows."""
    batch, worst = scheduler._batch, 0.0
    if batch is None:
        return 0.0, 0
    for number, row in enumerate(batch.members):
        text = [*row.request.prompt, *row.new][:-1]
        layers = batch.executor.cache.layers
        full = RaggedCache([None] * len(layers), batch=1, capacity=len(text), device=torch.device("cpu"))
        full.begin_aligned(0, len(text))
        with torch.no_grad():
            model.offset_hidden_states(torch.tensor([text]), past_key_values=full, use_cache=True)
        for mine, theirs in zip(layers, full.layers, strict=True):
            for kept, right in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                worst = max(worst, float((kept[number, :, : len(text)] - right[0]).abs().max()))
    return worst, len(batch.members)


@pytest.mark.parametrize("options", ["chain", "tree", "lean", "pieces"])
def test_caches_of_base_and_heads_hold_what_a_full_forward_says(options, monkeypatch):
    model = _model()
    asked = [Request(tuple(random_tokens(3 + 4 * row, seed=row).tolist()), 6 + 5 * row) for row in range(5)]
    script(monkeypatch, model, asked)
    scheduler = Scheduler(model, max_rows=3, **OPTIONS[options])
    for request in asked:
        scheduler.submit(request)
    compared = []
    while not scheduler.idle:
        scheduler.step()
        worst, rows = _difference_of_caches(scheduler, model)
        assert worst < 1e-5
        compared.append(rows)
    # Prompts that are read piece by piece enter one after the other, when the first rows have left.
    assert max(compared) == (2 if options == "pieces" else 3)
    assert sum(compared) > 8


def test_this_comparison_would_notice_a_newcomer_whose_heads_were_left_out(monkeypatch):
    model, base_layers = _model(), len(_model().family.layers)
    absorb = RaggedCache.absorb

    def forgetful(self, other, *, rows):
        for layer in other.layers[base_layers:]:
            layer.keys.zero_()
        absorb(self, other, rows=rows)

    monkeypatch.setattr(RaggedCache, "absorb", forgetful)
    scheduler = Scheduler(model, max_rows=3)
    for row in range(3):
        scheduler.submit(Request(tuple(random_tokens(5, seed=row).tolist()), 9 + row))
        scheduler.step()
    assert _difference_of_caches(scheduler, model)[0] > 1e-2


@settings(QUIET, max_examples=4)
@given(arrivals=arrivals, rows=st.integers(2, 4), executor=st.sampled_from(["eager", "lean"]))
def test_float32_texts_differ_only_at_near_ties(arrivals, rows, executor):
    model = _model(dtype=torch.float32)
    greedy = [(gap, Request(request.prompt, request.max_new_tokens)) for gap, request in arrivals]
    found = serve(Scheduler(model, max_rows=rows, executor=executor), greedy)
    expected = [alone(model, request) for _, request in greedy]
    prompts = [torch.tensor([list(request.prompt)]) for _, request in greedy]
    assert near_ties(model, prompts, [completion.tokens for completion in found], expected) <= 1
