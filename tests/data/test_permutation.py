import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.data.permutation import shuffled_index


@given(st.integers(1, 300), st.integers(), st.integers(0, 9))
def test_every_index_appears_exactly_once(size, seed, epoch):
    order = [shuffled_index(index, size=size, seed=seed, epoch=epoch) for index in range(size)]
    assert sorted(order) == [*range(size)]


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(shuffled_index(index, size=50, seed=seed, epoch=epoch) for index in range(50))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_order_is_the_same_on_every_machine():
    assert [shuffled_index(index, size=10**12, seed=7, epoch=3) for index in range(3)] == [
        908793358405,
        822087743473,
        737722679114,
    ]


def test_positions_are_spread_evenly():
    size, seeds = 8, 2000
    counts = [[0] * size for _ in range(size)]
    for seed in range(seeds):
        for index in range(size):
            counts[index][shuffled_index(index, size=size, seed=seed, epoch=0)] += 1
    expected = seeds / size
    chi_square = sum((count - expected) ** 2 / expected for row in counts for count in row)
    assert chi_square < 95  # 49 degrees of freedom: exceeded by chance once in 10,000 choices of seeds


def test_an_index_outside_is_refused():
    for index in (-1, 4):
        with pytest.raises(IndexError, match=r"0\.\.3"):
            shuffled_index(index, size=4, seed=0, epoch=0)
