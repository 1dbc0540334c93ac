import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.data.loader import PackedLoader, held_out_windows
from headway.data.packing import PackedTokens
from headway.errors import ConfigError, DataError


@pytest.fixture
def packed(byte_cache):
    """13 windows of 5 tokens, each told apart by its first token; the last is filled up."""
    return PackedTokens(byte_cache(bytes(range(60))), sequence_length=5, seed=3)


def rows(batch):
    return batch.input_ids_BT.tolist()


def test_a_batch_is_four_integer_tensors_for_the_model(packed):
    batch = PackedLoader(packed, batch_size=3).batch(0)
    assert len(batch) == 3
    inputs = batch.model_inputs()
    assert inputs.keys() == {"input_ids", "labels", "position_ids", "document_ids"}
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}
    assert {tuple(tensor.shape) for tensor in inputs.values()} == {(3, 5)}


def test_labels_are_the_inputs_unshifted(packed):
    batch = PackedLoader(packed, batch_size=13).batch(0)
    valid = batch.labels_BT != -100
    assert torch.equal(batch.labels_BT[valid], batch.input_ids_BT[valid])
    assert int((~valid).sum()) == 13 * 5 - 61


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(start=st.integers(0, 40), batch_size=st.integers(1, 6), replicas=st.integers(1, 4))
def test_content_does_not_depend_on_batch_size_or_processes(packed, start, batch_size, replicas):
    one_by_one = PackedLoader(packed, batch_size=1)
    loaders = [
        PackedLoader(packed, batch_size=batch_size, num_replicas=replicas, rank=rank) for rank in range(replicas)
    ]
    total = loaders[0].samples_per_batch
    assert total == batch_size * replicas
    expected = [rows(one_by_one.batch(start + place))[0] for place in range(total)]
    for rank, loader in enumerate(loaders):
        assert rows(loader.batch(start)) == expected[rank::replicas]


def test_batches_run_on_across_epoch_ends_and_each_epoch_is_complete(packed):
    assert len(packed) == 13
    loader = PackedLoader(packed, batch_size=4)
    stream = [row for start in range(0, 52, 4) for row in rows(loader.batch(start))]
    epochs = [stream[start : start + 13] for start in range(0, 52, 13)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 4
    assert len({tuple(row) for row in epochs[0]}) == 13


def test_one_integer_is_the_whole_state(packed):
    first, second = PackedLoader(packed, batch_size=2), PackedLoader(packed, batch_size=2)
    for start in range(0, 20, 2):
        first.batch(start)
    assert rows(first.batch(20)) == rows(second.batch(20))
    assert rows(pickle.loads(pickle.dumps(second)).batch(20)) == rows(first.batch(20))


def test_a_batch_splits_into_rows_in_order_and_moves(packed):
    batch = PackedLoader(packed, batch_size=5).batch(0)
    parts = [*batch.split(2)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.labels_BT for part in parts]), batch.labels_BT)
    assert torch.equal(batch.to("cpu").position_ids_BT, batch.position_ids_BT)
    assert batch.to("meta").document_ids_BT.device.type == "meta"
    with pytest.raises(ConfigError, match="at least 1"):
        next(batch.split(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1, "num_replicas": 0}, "rank must be"),
        ({"batch_size": 1, "num_replicas": 2, "rank": 2}, "got rank 2 of 2"),
    ],
)
def test_impossible_loaders_are_refused(packed, options, message):
    with pytest.raises(ConfigError, match=message):
        PackedLoader(packed, **options)


def test_a_negative_position_is_refused(packed):
    with pytest.raises(DataError, match="counts from 0"):
        PackedLoader(packed, batch_size=1).batch(-1)


def test_held_out_windows_are_evenly_spaced_and_always_the_same(byte_cache):
    cache = byte_cache(bytes(range(100)))
    windows = held_out_windows(cache, sequence_length=5, max_windows=4)
    assert windows.input_ids_BT[:, 0].tolist() == [10, 35, 60, 85]
    assert torch.equal(windows.input_ids_BT, windows.labels_BT)
    assert windows.position_ids_BT.tolist() == [[0, 1, 2, 3, 4]] * 4
    again = held_out_windows(cache, sequence_length=5, max_windows=4)
    assert rows(again) == rows(windows)


def test_held_out_windows_are_all_whole_windows_at_most(byte_cache):
    cache = byte_cache(bytes(range(50)), bytes(range(50)))
    windows = held_out_windows(cache, sequence_length=10, max_windows=1000)
    assert torch.equal(windows.input_ids_BT.flatten(), torch.from_numpy(cache.tokens[:100].astype("int64")))
    assert windows.document_ids_BT[5].tolist() == [0] + [1] * 9


def test_held_out_text_shorter_than_a_window_is_one_shorter_window(byte_cache):
    windows = held_out_windows(byte_cache(b"abc"), sequence_length=64, max_windows=8)
    assert rows(windows) == [[97, 98, 99, 256]]
    with pytest.raises(DataError, match="hold out more text"):
        held_out_windows(byte_cache(b""), sequence_length=64, max_windows=8)


@pytest.mark.parametrize(
    "options", [{"sequence_length": 1, "max_windows": 1}, {"sequence_length": 8, "max_windows": 0}]
)
def test_impossible_held_out_windows_are_refused(byte_cache, options):
    with pytest.raises(ConfigError, match="raise them"):
        held_out_windows(byte_cache(b"abc"), **options)
