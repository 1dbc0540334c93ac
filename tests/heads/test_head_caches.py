"""Keys and values of every head after ragged acceptance, compared with one full teacher-forced forward.

Equal text cannot show this: a head with a wrong cache only drafts worse.
"""

from __future__ import annotations

import pytest
import torch

from decoding_cases import base_continuation, ragged_batch, script_levels, script_picks
from head_cases import CHANGES_BASE, IN_TURN, WITH_CACHE, head_model
from headway.decoding.cache import RaggedCache, attention_windows
from headway.decoding.engine import ENGINE, decoding_context
from headway.heads.sequential import SequentialHeads

STEPS = 8
BATCHES = {"alone": ragged_batch([5], "l"), "ragged": ragged_batch([1, 9, 6], "lrl")}
SEQUENTIAL = sorted(name for name in WITH_CACHE if name in IN_TURN)


def largest_difference(name, batch, monkeypatch, *, drafts=3, family="llama", asked=None):
    """Over keys and values of base and heads at every position whose tokens are known; also the acceptances."""
    model = head_model(name, family, dtype=torch.float64)
    room = 4 * STEPS + 8
    if name in CHANGES_BASE:
        plain = model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=room, num_draft_tokens=0
        )
        truth = plain[:, batch.input_ids.shape[1] :].tolist()
    else:
        truth = [base_continuation(model, row, room) for row in batch.rows()]
    with monkeypatch.context() as patch:
        (script_levels if asked else script_picks)(patch, truth)
        loop = ENGINE.start(
            model,
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=room,
            num_draft_tokens=drafts,
            **(asked or {}),
        )
        with decoding_context(model):
            for _ in range(STEPS):
                loop.step()
    worst = 0.0
    lengths = {len(forward.tokens) for row in loop.rows for forward in row[1:]}
    base_layers = len(model.family.layers)
    for row, prompt in enumerate(batch.rows()):
        text = torch.tensor([[*prompt[0].tolist(), *loop.new_tokens(row)]])  # the last token has not been fed
        known = text.shape[1]
        windows = attention_windows(model.config, num_heads=model.heads.cache_layers(drafts))
        full = RaggedCache([None] * len(windows), batch=1, capacity=known, device=text.device)
        full.begin_aligned(0, known)
        with torch.no_grad():
            model.offset_hidden_states(text, past_key_values=full, use_cache=True, num_offsets=1 + drafts)
        for index, (mine, theirs) in enumerate(zip(loop.executor.cache.layers, full.layers, strict=True)):
            depth = index - base_layers + 1
            final = known - (depth if name in IN_TURN and depth >= 1 else 1)
            for found, wanted in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                worst = max(worst, float((found[row, :, :final] - wanted[0, :, :final]).abs().max()))
    return worst, lengths


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", sorted(WITH_CACHE))
def test_every_known_position_has_the_keys_and_values_of_a_full_forward(name, batch, monkeypatch):
    worst, lengths = largest_difference(name, BATCHES[batch], monkeypatch)
    assert worst < 1e-5
    assert len(lengths) > 1


@pytest.mark.parametrize("family", ["qwen3-sliding", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_sequential_caches_are_right_in_other_families_and_for_shorter_drafts(family, drafts, monkeypatch):
    worst, _ = largest_difference("sequential", BATCHES["ragged"], monkeypatch, drafts=drafts, family=family)
    assert worst < 1e-5


@pytest.mark.parametrize(
    "asked", [{"tree": 9}, {"tree": "dynamic", "tree_nodes": 4}, {"drafts": "heads+lookup"}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "qwen3-sliding"])
def test_sequential_caches_are_right_after_paths_of_trees(family, asked, monkeypatch):
    worst, lengths = largest_difference("sequential", BATCHES["ragged"], monkeypatch, family=family, asked=asked)
    assert worst < 1e-5
    assert len(lengths) > 1


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_this_comparison_would_notice_entries_left_from_rejected_drafts(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SequentialHeads, "lookback", lambda self, num_heads: 0)
        worst, _ = largest_difference(name, BATCHES["ragged"], monkeypatch)
    assert worst > 1e-2


def test_this_comparison_would_notice_one_position_too_few_looked_back(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SequentialHeads, "lookback", lambda self, num_heads: num_heads - 2)
        worst, _ = largest_difference("sequential", BATCHES["ragged"], monkeypatch)
    assert worst > 1e-2
