"""Masks of decoding say what the families' own mask functions say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen3Config
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from headway.decoding.cache import RaggedCache, attention_windows
from headway.decoding.masks import BlockMasks, additive_mask
from headway.errors import DecodingError

CPU = torch.device("cpu")


def _allowed_by_transformers(positions, slots, window):
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    zero = torch.zeros((), dtype=torch.long)
    return torch.tensor(
        [[[bool(rule(zero, zero, query, slot)) for slot in slots] for query in row] for row in positions]
    )


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_ragged_masks_are_the_families_rule_at_every_row_s_own_position(starts, width, window):
    positions = torch.tensor(starts)[:, None] + torch.arange(width)
    slots = torch.arange(18)
    mask = additive_mask(positions, slots, window=window, dtype=torch.float32)
    assert torch.equal(mask[:, 0] == 0, _allowed_by_transformers(positions, slots, window))
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}


@given(st.integers(0, 15), st.integers(1, 4), st.integers(1, 9))
def test_aligned_masks_are_views_of_one_band_and_say_the_same(position, width, window):
    config = MistralConfig(num_hidden_layers=2, sliding_window=window)
    cache = RaggedCache(attention_windows(config, num_heads=1), batch=1, capacity=20, device=CPU)
    masks = BlockMasks(config, cache, width=4, dtype=torch.float64, device=CPU)
    cache.begin_aligned(position, width)
    aligned = masks.aligned()
    view = cache.views[window]
    slots = torch.arange(view.start, view.start + view.length)
    positions = torch.arange(position, position + width)[None]
    assert torch.equal(aligned[:, 0] == 0, _allowed_by_transformers(positions, slots, window))
    assert aligned.untyped_storage().data_ptr() == masks.aligned().untyped_storage().data_ptr()
    # What the view leaves out, no query of the block could have seen.
    hidden = torch.arange(view.start)
    assert not _allowed_by_transformers(positions, hidden, window).any()


def test_a_family_with_layer_types_gets_one_mask_per_type():
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(num_hidden_layers=3, sliding_window=4, use_sliding_window=True, layer_types=types)
    assert attention_windows(config, num_heads=2) == [None, 4, None, None, None]
    cache = RaggedCache(attention_windows(config, num_heads=2), batch=2, capacity=12, device=CPU)
    masks = BlockMasks(config, cache, width=3, dtype=torch.float32, device=CPU)
    cache.begin_aligned(8, 3)
    assert {kind: mask.shape[-1] for kind, mask in masks.aligned().items()} == {
        "full_attention": 11,
        "sliding_attention": 6,
    }
    slots = torch.tensor([[5, 6, 7], [8, 9, 10]])
    cache.begin_ragged(slots, first=5, end=11)
    assert {kind: tuple(mask.shape) for kind, mask in masks.ragged(slots).items()} == {
        "full_attention": (2, 1, 3, 11),
        "sliding_attention": (2, 1, 3, 9),
    }


def test_a_single_query_needs_no_mask_where_attention_can_do_without():
    config = LlamaConfig(num_hidden_layers=2, attn_implementation="sdpa")
    cache = RaggedCache([None, None], batch=1, capacity=12, device=CPU)
    masks = BlockMasks(config, cache, width=1, dtype=torch.float32, device=CPU)
    cache.begin_aligned(5, 1)
    assert masks.aligned() is None


def test_layers_whose_state_cannot_be_taken_back_are_refused():
    config = Qwen3Config(num_hidden_layers=1)
    config.layer_types = ["linear_attention"]
    with pytest.raises(DecodingError, match="linear_attention"):
        attention_windows(config, num_heads=0)


def test_a_cache_refuses_to_write_beyond_its_capacity():
    cache = RaggedCache([None], batch=1, capacity=4, device=CPU)
    with pytest.raises(DecodingError, match="4 slots"):
        cache.begin_aligned(3, 2)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=3), st.integers(1, 3))
def test_ragged_writes_land_in_each_rows_own_slots_and_nowhere_else(starts, width):
    batch = len(starts)
    cache = RaggedCache([None], batch=batch, capacity=9, device=CPU)
    slots = torch.tensor(starts)[:, None] + torch.arange(width)
    cache.begin_ragged(slots, first=min(starts), end=max(starts) + width)
    new = torch.rand(batch, 2, width, 3) + 1
    keys, values = cache.update(new, -new, 0)
    expected = torch.zeros(batch, 2, 9, 3)
    for row, start in enumerate(starts):
        expected[row, :, start : start + width] = new[row]
    assert torch.equal(cache.layers[0].keys, expected)
    assert torch.equal(values, -expected[:, :, : max(starts) + width])
    assert keys.shape[2] == max(starts) + width
