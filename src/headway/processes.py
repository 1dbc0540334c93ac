"""The processes that train and evaluate together, and how they agree.

A run on several processes goes wrong when one of them knows something that the others do not: that a signal came, that a
file is damaged, that the disk is full. So whatever decides where a run goes is decided here, by all of them together.
What is exchanged here are a few numbers and small objects in host memory; gradients and weights go other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from headway.errors import HeadwayError

T = TypeVar("T")

# One process may read text for hours while the others wait; one that is gone is noticed at once all the same, since its
# connections close.
_LONGEST_WAIT = timedelta(days=7)


class PeerError(HeadwayError):
    """The end of this process because of an error that another one has met, and told."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None
    error: str | None


class Processes:
    """The processes of a run as one of them sees them; a single one needs no process group and exchanges nothing.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        local_rank: number of this process on its machine, from 0.
    """

    def __init__(self, *, rank: int = 0, count: int = 1, local_rank: int = 0, control: Any = None) -> None:
        """See `joined`; without arguments one process alone.

        Args:
            rank: of this process.
            count: of all processes.
            local_rank: of this process on its machine.
            control: a process group over all of them that takes tensors in host memory; None for one process.
        """
        assert count == 1 or control is not None, "several processes need a group"
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._control = control

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    def share_of(self, items: int) -> range:
        """The indices out of 0..items - 1 that this process takes: every `count`-th, from `rank` on."""
        return range(self.rank, items, self.count)

    # -------------------------------------------------------------------------------------------- numbers

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes of a tensor on the device of the gradients; the same bits everywhere."""
        if not self.several:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes pass."""
        if not self.several:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control)
        return int(value)

    # -------------------------------------------------------------------------------------------- objects

    def gathered(self, value: T) -> list[T]:
        """What every process passes, in the order of their ranks."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._control)
        return cast(list[T], values)

    def from_main(self, value: T) -> T:
        """What the main process passes."""
        if not self.several:
            return value
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return cast(T, values[0])

    # -------------------------------------------------------------------------------------------- doing things

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives in the main process, the only one that runs it.

        Raises:
            PeerError: in the others, where it fails there; the main process raises its own error.
        """
        if not self.several:
            return action()
        if self.is_main:
            try:
                value = action()
            except Exception as error:
                self.from_main(_Outcome[T](None, _words(error)))
                raise
            self.from_main(_Outcome(value, None))
            return value
        outcome = self.from_main(_Outcome[T](None, None))
        if outcome.error is not None:
            raise PeerError(outcome.error)
        return cast(T, outcome.value)

    def main_first(self, action: Callable[[], T]) -> T:
        """What `action` gives in this process; the main one runs it alone before the others (to fill a cache, say).

        Raises:
            PeerError: it failed in another process.
        """
        if not self.several:
            return action()
        mine: list[T] = []
        self.on_main(lambda: mine.append(action()))
        return self.together(lambda: mine[0] if mine else action())

    def together(self, action: Callable[[], T]) -> T:
        """What `action` gives in this process; where it fails in one, it fails in all.

        Raises:
            PeerError: in all but the first process in which it failed; the message names that one's rank.
        """
        if not self.several:
            return action()
        failure: Exception | None = None
        value: T | None = None
        try:
            value = action()
        except PeerError:
            # Met in an agreement inside the action, which all processes have left by now.
            raise
        except Exception as error:
            failure = error
        messages = self.gathered(None if failure is None else _words(failure))
        first = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if failure is not None and first == self.rank:
            raise failure
        if first is not None:
            raise PeerError(f"rank {first}: {messages[first]}")
        return cast(T, value)

    def same_everywhere(self, error: HeadwayError) -> HeadwayError:
        """An error that every process meets at this place: the main one tells it."""
        return error if self.is_main else PeerError(str(error))


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, HeadwayError) else f"{type(error).__name__}: {error}"


@contextmanager
def process_group_of_all(*, local_rank: int) -> Iterator[Processes]:
    """The processes of the default process group inside the block.

    Args:
        local_rank: of this process on its machine.
    """
    control = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    try:
        yield Processes(rank=dist.get_rank(), count=dist.get_world_size(), local_rank=local_rank, control=control)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group(control)


def current_processes() -> Processes:
    """The processes of the default process group, or one alone where there is none; for evaluations.

    Without a group for objects: `total` and `share_of` work, agreements do not.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    return Processes(rank=dist.get_rank(), count=dist.get_world_size(), control=dist.group.WORLD)
