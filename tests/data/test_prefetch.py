import threading

import pytest
import torch

from headway.data.loader import PackedLoader
from headway.data.packing import PackedTokens
from headway.data.prefetch import PrefetchingLoader
from headway.errors import ConfigError, DataError


@pytest.fixture
def loader(byte_cache):
    packed = PackedTokens(byte_cache(bytes(range(200))), sequence_length=5, seed=3)
    return PackedLoader(packed, batch_size=2, num_replicas=2, rank=1)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_batches(loader, workers):
    with PrefetchingLoader(loader, workers=workers) as ahead:
        assert ahead.samples_per_batch == loader.samples_per_batch == 4
        for start in [*range(0, 100, 4), 8, 12, 400, 0]:
            assert torch.equal(ahead.batch(start).input_ids_BT, loader.batch(start).input_ids_BT)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_the_next_batches_are_made_before_they_are_asked_for(loader):
    made, all_made = [], threading.Event()
    batch = loader.batch

    def counted(start):
        made.append(start)
        if len(made) == 4:
            all_made.set()
        return batch(start)

    loader.batch = counted
    with PrefetchingLoader(loader, workers=1, ahead=3) as ahead:
        ahead.batch(0)
        assert all_made.wait(10)
        assert made == [0, 4, 8, 12]


def test_mistakes_come_back_to_the_caller(loader):
    with PrefetchingLoader(loader, workers=1) as ahead, pytest.raises(DataError, match="counts from 0"):
        ahead.batch(-4)
    with pytest.raises(ConfigError, match="at least 1"):
        PrefetchingLoader(loader, workers=0)
