"""Batches made ahead by threads: the same ones, whatever their number.

A batch is a pure function of the global sample index, so threads need no state of their own, and there is nothing to
save: a batch that was made and not asked for is forgotten.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from headway.data.loader import Batch, PackedLoader
from headway.errors import ConfigError


class PrefetchingLoader:
    """A `PackedLoader` whose next batches are made while the last one is used.

    Threads are enough: a batch is a few copies out of mapped memory, and numpy copies without holding the interpreter.

    Args:
        loader: makes the batches.
        workers: threads, at least 1.
        ahead: batches made before they are asked for; None takes one more than there are threads.

    Raises:
        ConfigError: workers < 1 or ahead < 1.
    """

    def __init__(self, loader: PackedLoader, *, workers: int, ahead: int | None = None) -> None:
        ahead = workers + 1 if ahead is None else ahead
        if workers < 1 or ahead < 1:
            raise ConfigError(f"workers and ahead must be at least 1: got {workers} and {ahead}; raise them")
        self.loader = loader
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._waiting: dict[int, Future[Batch]] = {}

    def __enter__(self) -> PrefetchingLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def samples_per_batch(self) -> int:
        """How far one batch of every process moves the global sample index."""
        return self.loader.samples_per_batch

    def batch(self, global_sample_index: int) -> Batch:
        """What the loader gives for a global sample index.

        Raises:
            DataError: a negative index.
        """
        wanted = [global_sample_index + number * self.samples_per_batch for number in range(self._ahead + 1)]
        for index in self._waiting.keys() - set(wanted):
            self._waiting.pop(index).cancel()
        for index in wanted:
            if index not in self._waiting:
                self._waiting[index] = self._threads.submit(self.loader.batch, index)
        return self._waiting.pop(global_sample_index).result()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._waiting.clear()
