from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.data.loader import PackedLoader
from headway.data.mixture import Mixture, MixturePart, pack_rows
from headway.data.packing import PackedSample, PackedTokens
from headway.data.permutation import shuffled_index
from headway.data.shares import block_counts
from headway.errors import ConfigError


class Numbered:
    """Rows that only say which they are."""

    sequence_length = 4

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        return self.name, epoch, shuffled_index(index, size=self.size, seed=5, epoch=epoch)


def mixture(sizes, weights, seed=0):
    parts = [
        MixturePart(f"{number}", Numbered(number, size), weight)
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return Mixture(parts, seed=seed)


PARTS = st.lists(st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 3, 0.5, 0.7])), min_size=1, max_size=4)


@settings(deadline=None)
@given(PARTS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 500))
def test_every_source_appears_as_often_as_its_weight_asks(parts, seed, blocks, extra):
    mixed = mixture(*zip(*parts, strict=True), seed=seed)
    block = sum(mixed.counts)
    samples = [mixed.locate(index)[0] for index in range(min(blocks * block, 600) // block * block)]
    counted = Counter(samples)
    weights = [weight for _, weight in parts]
    for number, weight in enumerate(weights):
        assert counted[number] == pytest.approx(len(samples) * weight / sum(weights))
    # and between the ends of blocks never more than a block away
    part = Counter(mixed.locate(index)[0] for index in range(extra))
    for number, weight in enumerate(weights):
        assert abs(part[number] - extra * weight / sum(weights)) <= block


@settings(deadline=None)
@given(PARTS, st.integers(0, 3))
def test_no_row_of_a_source_repeats_within_its_own_epoch(parts, seed):
    sizes, weights = zip(*parts, strict=True)
    mixed = mixture(sizes, weights, seed=seed)
    total = 2 * len(mixed) + 7
    samples = [mixed.sample(index % len(mixed), index // len(mixed)) for index in range(total)]
    seen = Counter(samples)
    for number, size in enumerate(sizes):
        own = [sample for sample in seen if sample[0] == number]
        given_ = sum(seen[sample] for sample in own)
        # each (epoch, row) at most once, and no epoch begins before the last one is complete but for a block's shuffle
        assert all(seen[sample] == 1 for sample in own)
        per_epoch = Counter(epoch for _, epoch, _ in own)
        complete = (given_ - mixed.counts[number]) // size
        assert all(per_epoch[epoch] == size for epoch in range(max(complete, 0)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(start=st.integers(0, 60), batch=st.integers(1, 4), replicas=st.integers(1, 3))
def test_mixed_content_does_not_depend_on_batch_size_or_processes(byte_cache_parts, start, batch, replicas):
    mixed = Mixture(byte_cache_parts, seed=3)
    one_by_one = PackedLoader(mixed, batch_size=1)
    expected = [one_by_one.batch(start + place).input_ids_BT[0].tolist() for place in range(batch * replicas)]
    for rank in range(replicas):
        loader = PackedLoader(mixed, batch_size=batch, num_replicas=replicas, rank=rank)
        assert loader.batch(start).input_ids_BT.tolist() == expected[rank::replicas]


@pytest.fixture(scope="module")
def byte_cache_parts(tmp_path_factory):
    from headway.data.sources import Document
    from headway.data.token_cache import build_token_cache
    from headway.data.tokenizers import byte_tokenizer

    parts = []
    for number, (size, weight) in enumerate([(90, 0.5), (20, 0.3), (47, 0.2)]):
        folder = tmp_path_factory.mktemp("mixture") / f"{number}"
        documents = [Document("a", "a", bytes([number]) * size)]
        cache = build_token_cache(documents, byte_tokenizer(), folder)
        parts.append(MixturePart(f"{number}", PackedTokens(cache, sequence_length=5, seed=1), weight))
    return parts


def test_the_order_is_a_pure_function_of_seed_and_number():
    first, again, other = (mixture([10, 20], [0.3, 0.7], seed=seed) for seed in (1, 1, 2))
    order = [first.locate(index) for index in range(100)]
    assert [again.locate(index) for index in reversed(range(100))] == order[::-1]
    assert [other.locate(index) for index in range(100)] != order
    # each block in an order of its own
    assert len({tuple(number for number, _ in order[start : start + 10]) for start in range(0, 100, 10)}) > 5


def test_an_epoch_has_as_many_rows_as_all_sources_and_the_next_goes_on():
    mixed = mixture([10, 20], [1, 1])
    assert len(mixed) == 30
    assert mixed.sequence_length == 4
    assert mixed.sample(0, 1) == mixed.parts[mixed.locate(30)[0]].rows.sample(
        *reversed(divmod(mixed.locate(30)[1], 20))
    )
    with pytest.raises(IndexError, match=r"0\.\.29"):
        mixed.sample(30, 0)
    assert mixed.describe(60) == "0 50 % (3 epochs), 1 50 % (1.5 epochs)"


@given(st.lists(st.floats(1, 100), min_size=1, max_size=6))
def test_blocks_hold_the_shares_to_a_ten_thousandth(weights):
    counts = block_counts(weights)
    block = sum(counts)
    assert block <= 10_000
    assert all(
        abs(count / block - weight / sum(weights)) <= 1e-4 for count, weight in zip(counts, weights, strict=True)
    )


def test_mixtures_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="too small beside"):
        block_counts([1.0, 1e-6])
    with pytest.raises(ConfigError, match="above 0"):
        block_counts([1.0, 0.0])
    with pytest.raises(ConfigError, match="no parts"):
        Mixture([], seed=0)
    longer = Numbered(1, 3)
    longer.sequence_length = 8
    with pytest.raises(ConfigError, match="same sequence_length"):
        Mixture([MixturePart("a", Numbered(0, 3), 1), MixturePart("b", longer, 1)], seed=0)


def test_rows_of_a_cache_without_prompts_are_windows(byte_cache):
    rows = pack_rows(byte_cache(b"abc" * 10), sequence_length=5, seed=0)
    assert isinstance(rows, PackedTokens)
    assert isinstance(rows.sample(0, 0), PackedSample)
