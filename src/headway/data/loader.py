"""Batches by number: the whole data state of a run is one integer.

Legend: B batch, T positions.

Sample g of a run is window `g % len(packed)` of epoch `g // len(packed)`, whatever the batch size and the number of
processes. A step that starts at g consumes the samples g .. g + samples_per_batch - 1, all processes together, and the
next one starts where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from headway.data.cache_format import TokenCache
from headway.data.packing import PackedSample, Rows, cut_window
from headway.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of equal length; four int64 tensors [B, T].

    Attributes:
        input_ids_BT: token ids.
        labels_BT: the same ids, not shifted (the loss shifts them); -100, on filling and prompts, is ignored.
        position_ids_BT: from 0 at every document start and at the start of the row.
        document_ids_BT: differ between the documents of a row.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    document_ids_BT: Tensor

    def __len__(self) -> int:
        """Rows."""
        return int(self.input_ids_BT.shape[0])

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of `MultiTokenLM.forward`."""
        return {field.name.removesuffix("_BT"): getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))

    def rows(self, indices: Sequence[int]) -> Batch:
        """Those of the rows."""
        return Batch(*(getattr(self, field.name)[list(indices)] for field in fields(self)))

    def split(self, batch_size: int) -> Iterator[Batch]:
        """The rows in order, at most `batch_size` at a time."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1: got {batch_size}; raise it")
        for start in range(0, len(self), batch_size):
            yield Batch(*(getattr(self, field.name)[start : start + batch_size] for field in fields(self)))


def _stack(samples: Sequence[PackedSample]) -> Batch:
    return Batch(
        *(
            torch.from_numpy(np.stack([getattr(sample, field.name) for sample in samples]))
            for field in fields(PackedSample)
        )
    )


class PackedLoader:
    """Batches of one process out of `num_replicas`.

    At global sample index g, process r takes the samples g + r, g + r + num_replicas, ...: together the processes take
    what one process with num_replicas times the batch size would.

    Args:
        packed: the rows and their order.
        batch_size: rows per batch of each process.
        num_replicas: processes that train together.
        rank: of this process, from 0.

    Raises:
        ConfigError: batch_size < 1, num_replicas < 1, or rank outside range(num_replicas).
    """

    def __init__(self, packed: Rows, *, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1: got {batch_size}; raise it")
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ConfigError(
                f"rank must be in 0..num_replicas - 1: got rank {rank} of {num_replicas}; "
                f"pass the rank and world size of the process group"
            )
        self.packed = packed
        self.batch_size = batch_size
        self.num_replicas = num_replicas
        self.rank = rank

    @property
    def samples_per_batch(self) -> int:
        """How far one batch of every process moves the global sample index."""
        return self.batch_size * self.num_replicas

    def batch(self, global_sample_index: int) -> Batch:
        """This process's rows of the step that starts at a global sample index; runs on across epoch ends.

        Raises:
            DataError: a negative index.
        """
        if global_sample_index < 0:
            raise DataError(f"the global sample index counts from 0: got {global_sample_index}; pass 0 to start afresh")
        first = global_sample_index + self.rank
        positions = range(first, first + self.samples_per_batch, self.num_replicas)
        return _stack([self._sample(position) for position in positions])

    def close(self) -> None:
        """Nothing to let go of; loaders with threads have."""

    def _sample(self, global_sample_index: int) -> PackedSample:
        epoch, index = divmod(global_sample_index, len(self.packed))
        return self.packed.sample(index, epoch)


def held_out_windows(cache: TokenCache, *, sequence_length: int, max_windows: int) -> Batch:
    """Windows evenly spaced over held-out text, the same at every call: [W, T], nothing filled up.

    They are windows of the stream cut every T tokens, so no two overlap. Text shorter than one window gives one shorter
    window.

    Args:
        cache: the held-out text.
        sequence_length: T.
        max_windows: W is this, or all whole windows there are.

    Raises:
        ConfigError: sequence_length < 2 or max_windows < 1.
        DataError: fewer than two tokens.
    """
    if sequence_length < 2 or max_windows < 1:
        raise ConfigError(
            f"held-out windows need sequence_length >= 2 and max_windows >= 1: got {sequence_length} and "
            f"{max_windows}; raise them"
        )
    if cache.num_tokens < 2:
        raise DataError(f"held-out text needs two tokens at least: got {cache.num_tokens}; hold out more text")
    length = min(sequence_length, cache.num_tokens)
    available = cache.num_tokens // length
    count = min(max_windows, available)
    chosen = [(2 * number + 1) * available // (2 * count) for number in range(count)]
    return _stack([cut_window(cache, index * length, length) for index in chosen])
