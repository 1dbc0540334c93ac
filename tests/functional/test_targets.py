"""An offset means one thing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.functional.targets import count_valid_targets, shift_targets


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 14), offset=st.integers(1, 16))
def test_position_t_holds_the_label_of_t_plus_offset_of_the_same_document_or_nothing(data, length, offset):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=length, max_size=length))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[:length]
    positions = torch.cat([torch.arange(n) for n in lengths])[:length]
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, 9), min_size=length, max_size=length)))
    labels[labels < 0] = -100
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
    given_ids = {}
    if data.draw(st.booleans()):
        given_ids["position_ids_BT"] = positions[None]
    if not given_ids or data.draw(st.booleans()):
        given_ids["document_ids_BT"] = documents[None]
    got = shift_targets(labels[None], offset=offset, attention_mask_BT=mask[None], **given_ids)[0]
    for t in range(length):
        ahead = t + offset
        exists = ahead < length and documents[t] == documents[ahead] and mask[t] and mask[ahead]
        assert got[t].item() == (labels[ahead].item() if exists else -100)


def test_labels_are_not_changed_and_offsets_beyond_the_row_have_no_target():
    labels = torch.tensor([[1, 2, 3]])
    assert shift_targets(labels, offset=3).tolist() == [[-100, -100, -100]]
    assert labels.tolist() == [[1, 2, 3]]


def test_counts_are_those_of_the_shifted_targets():
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 2, -100, 4, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    assert count_valid_targets(labels, num_future_tokens=4, position_ids_BT=positions).tolist() == [6, 3, 2, 1]


def test_one_row_of_positions_serves_the_whole_batch():
    labels = torch.arange(8).view(2, 4)
    got = shift_targets(labels, offset=1, position_ids_BT=torch.tensor([[0, 1, 0, 1]]))
    assert got.tolist() == [[1, -100, 3, -100], [5, -100, 7, -100]]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"offset": 0}, "counts from 1"),
        ({"offset": 1, "position_ids_BT": torch.zeros(1, 3)}, "position_ids"),
        ({"offset": 1, "document_ids_BT": torch.zeros(3, 4)}, "document_ids"),
        ({"offset": 1, "attention_mask_BT": torch.ones(2, 5)}, "attention_mask"),
    ],
)
def test_wrong_shapes_and_offsets_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        shift_targets(torch.zeros(2, 4, dtype=torch.long), **arguments)
