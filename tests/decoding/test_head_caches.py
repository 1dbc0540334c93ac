"""Keys, values and hidden states of every head, compared with a full forward that uses no cache.

Equal text cannot show this: a head with a wrong cache only drafts worse.
"""

from __future__ import annotations

import pytest
import torch

from decoding_cases import base_continuation, ragged_batch, script_drafts
from headway.decoding.cache import RaggedCache
from headway.decoding.engine import ENGINE, decoding_context
from headway.decoding.executor import EagerExecutor
from tiny_models import FAMILIES, tiny_model

STEPS = 10
BATCHES = {"alone": ragged_batch([5], "l"), "ragged": ragged_batch([3, 9, 6], "lrl")}


def _decode(model, batch, monkeypatch):
    """Step by hand through drafts that are right about two times out of three; keep every forward's hidden states."""
    states, starts = [], []
    with monkeypatch.context() as patch:
        script_drafts(patch, [base_continuation(model, row, 4 * STEPS + 8) for row in batch.rows()])
        block = EagerExecutor.block

        def recording(self, block_BM, positions, *, num_offsets):
            found = block(self, block_BM, positions, num_offsets=num_offsets)
            states.append(found)
            starts.append(list(positions))
            return found

        patch.setattr(EagerExecutor, "block", recording)
        loop = ENGINE.start(model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=4 * STEPS + 8)
        with decoding_context(model):
            for _ in range(STEPS):
                loop.step()
    return loop, states, starts


def _largest_difference(model, batch, monkeypatch):
    """Over hidden states, keys and values of every head at every accepted position; also counts and acceptances."""
    loop, states, starts = _decode(model, batch, monkeypatch)
    worst, compared, lengths = 0.0, 0, set()
    base_layers = len(model.family.layers)
    for row, prompt in enumerate(batch.rows()):
        # The last token has been chosen but not fed.
        text = [*prompt[0].tolist(), *loop.new_tokens(row)][:-1]
        full_cache = RaggedCache(
            [None] * (base_layers + len(model.heads)), batch=1, capacity=len(text), device=prompt.device
        )
        full_cache.is_reference = True
        full_cache.begin_aligned(0, len(text))
        with torch.no_grad():
            full = model.offset_hidden_states(torch.tensor([text]), use_cache=False)
            # Again with a cache that is written once and read by nobody else, for the keys and values alone.
            filled = model.offset_hidden_states(torch.tensor([text]), past_key_values=full_cache, use_cache=True)
        assert torch.equal(full.last_hidden_BTD, filled.last_hidden_BTD)
        for forward, found, positions in zip(loop.rows[row][1:], states, starts, strict=True):
            start, length = positions[row], len(forward.tokens)
            lengths.add(length)
            for head, reference in zip(found.future_hidden, full.future_hidden, strict=True):
                difference = head[row, :length] - reference[0, start : start + length]
                worst = max(worst, float(difference.abs().max()))
                compared += length
        for layer, reference in zip(loop.executor.cache.layers, full_cache.layers, strict=True):
            for mine, theirs in ((layer.keys, reference.keys), (layer.values, reference.values)):
                worst = max(worst, float((mine[row, :, : len(text)] - theirs[0]).abs().max()))
    return worst, compared, lengths


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_at_every_accepted_position_what_a_full_forward_says(family, batch, monkeypatch):
    model = tiny_model(family, dtype=torch.float64)
    worst, compared, lengths = _largest_difference(model, BATCHES[batch], monkeypatch)
    # Families whose norm computes in float32 can differ by one float32 rounding.
    assert worst < 1e-5
    assert compared >= 3 * STEPS
    assert len(lengths) > 1


@pytest.mark.parametrize("batch", BATCHES)
def test_this_comparison_would_notice_heads_that_never_write_their_cache(batch, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    base_layers = len(model.family.layers)
    update = RaggedCache.update

    def forgetful(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = update(self, key_states, value_states, layer_idx)
        if layer_idx >= base_layers and not getattr(self, "is_reference", False):
            keys.zero_()
            values.zero_()
        return keys, values

    monkeypatch.setattr(RaggedCache, "update", forgetful)
    worst, _, _ = _largest_difference(model, BATCHES[batch], monkeypatch)
    assert worst > 1e-2


def test_the_text_would_not_notice(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    batch = BATCHES["ragged"]
    truth = [base_continuation(model, row, 20) for row in batch.rows()]
    base_layers = len(model.family.layers)
    update = RaggedCache.update

    def forgetful(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = update(self, key_states, value_states, layer_idx)
        return (keys.zero_(), values.zero_()) if layer_idx >= base_layers else (keys, values)

    monkeypatch.setattr(RaggedCache, "update", forgetful)
    out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=20)
    assert out[:, batch.input_ids.shape[1] :].tolist() == truth
