import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.data.sources import Document
from headway.data.split import split_by_group
from headway.errors import ConfigError, DataError


def documents_of(sizes):
    """Two documents in each group, interleaved."""
    halves = [(group, half, size // 2 + half * (size % 2)) for half in (0, 1) for group, size in enumerate(sizes)]
    return [Document(f"{group}/{half}", f"{group}", b"x" * size) for group, half, size in halves]


GROUP_SIZES = st.lists(st.integers(1, 200), min_size=2, max_size=12)


@given(GROUP_SIZES, st.floats(0.01, 0.99), st.integers(0, 5))
def test_whole_groups_on_one_side_each_and_neither_side_empty(sizes, fraction, seed):
    documents = documents_of(sizes)
    split = split_by_group(documents, held_out_fraction=fraction, seed=seed)
    assert {d.group for d in split.train}.isdisjoint({d.group for d in split.held_out})
    assert sorted(d.name for d in split.train + split.held_out) == sorted(d.name for d in documents)
    assert sum(len(d.data) for d in split.train) > 0
    assert sum(len(d.data) for d in split.held_out) > 0
    order = [d.name for d in documents]
    assert [d.name for d in split.train] == sorted((d.name for d in split.train), key=order.index)


@given(GROUP_SIZES, st.floats(0.01, 0.5), st.integers(0, 5))
def test_the_fraction_is_met_to_half_the_smallest_group_left(sizes, fraction, seed):
    split = split_by_group(documents_of(sizes), held_out_fraction=fraction, seed=seed)
    held_out = sum(len(d.data) for d in split.held_out)
    target = fraction * sum(sizes)
    left = {d.group for d in split.train}
    smallest_left = min(size for group, size in enumerate(sizes) if f"{group}" in left)
    if len({d.group for d in split.held_out}) == 1 and held_out > target:
        assert held_out - target <= max(min(sizes) - target, smallest_left / 2) + 1e-9
    else:
        assert abs(held_out - target) <= smallest_left / 2 + 1e-9


def test_the_split_depends_on_seed_and_groups_alone():
    documents = documents_of([100 + group for group in range(40)])
    first = split_by_group(documents, held_out_fraction=0.1, seed=1)
    again = split_by_group(reversed(documents), held_out_fraction=0.1, seed=1)
    other = split_by_group(documents, held_out_fraction=0.1, seed=2)
    groups = [{d.group for d in split.held_out} for split in (first, again, other)]
    assert groups[0] == groups[1] != groups[2]
    assert first.held_out_fraction == pytest.approx(0.1, abs=0.01)
    assert "10." in first.describe() or "9." in first.describe()


def test_equal_groups_are_taken_in_the_order_of_their_hash():
    split = split_by_group(documents_of([10] * 20), held_out_fraction=0.2, seed=0)
    by_hash = sorted(range(20), key=lambda group: hashlib.sha256(f"0\0{group}".encode()).digest())
    assert {int(d.group) for d in split.held_out} == set(by_hash[:4])


@pytest.mark.parametrize("documents", [[], documents_of([10]), documents_of([10, 0, 0])])
def test_fewer_than_two_groups_with_text_cannot_be_split(documents):
    with pytest.raises(DataError, match="name the held-out text explicitly"):
        split_by_group(documents, held_out_fraction=0.1, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(fraction):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        split_by_group(documents_of([1, 1]), held_out_fraction=fraction, seed=0)
