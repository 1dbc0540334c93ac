"""Requests that have not ended: who waits, whom to tell, and since when."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING

from headway.decoding.handles import RequestHandle
from headway.decoding.requests import Completion, FinishReason
from headway.decoding.rows import Row
from headway.decoding.statistics import acceptance_statistics
from headway.errors import DecodingError, QueueFullError

if TYPE_CHECKING:
    from headway.decoding.scheduler import Scheduler


@dataclass
class Entry:
    """A request in the book.

    Attributes:
        handle: its owner's.
        submitted: when.
        begun: when its prompt began to be read; NaN before.
        first: when it got its first token; NaN before.
    """

    handle: RequestHandle
    submitted: float
    begun: float = math.nan
    first: float = math.nan


class RequestBook:
    """Safe to use from any thread: everything takes `changed` for moments and tells whoever waits for it.

    Attributes:
        changed: the lock, and what owners wait for.
        waiting: requests that have not been admitted, the next one first.
        closed: whether no more are taken.
        finished: requests that have ended.
        emitted_tokens: of all requests.
    """

    def __init__(self, clock: Callable[[], float], *, max_waiting: int, longest_draft: int) -> None:
        """An empty book.

        Args:
            clock: seconds.
            max_waiting: the most requests that may wait.
            longest_draft: drafted tokens that acceptance is counted for.
        """
        self.changed = Condition()
        self.waiting: deque[Row] = deque()
        self.closed = False
        self.finished = 0
        self.emitted_tokens = 0
        self._clock = clock
        self._max_waiting = max_waiting
        self._longest_draft = longest_draft
        self._ids = itertools.count()
        self._entries: dict[int, Entry] = {}
        self._cancelled: set[int] = set()

    @property
    def empty(self) -> bool:
        """Whether every request has ended."""
        return not self._entries

    @property
    def full(self) -> bool:
        """Whether no more may wait."""
        return len(self.waiting) >= self._max_waiting

    def enter(self, row: Row, scheduler: Scheduler) -> RequestHandle:
        """Put a row at the end of the queue and give it its number.

        Raises:
            DecodingError: the book is closed.
            QueueFullError: as many wait as may.
        """
        with self.changed:
            if self.closed:
                raise DecodingError("the scheduler is closed; make a new one")
            if self.full:
                raise QueueFullError(
                    f"{len(self.waiting)} requests are waiting, no more than max_waiting={self._max_waiting} may; try "
                    f"again later"
                )
            row.id = next(self._ids)
            handle = RequestHandle(scheduler, self.changed, row.id, row.request)
            self._entries[row.id] = Entry(handle, self._clock())
            self.waiting.append(row)
            self.changed.notify_all()
        return handle

    def take(self, fits: Callable[[Row], bool]) -> Row | None:
        """The next row that waits, if it fits."""
        with self.changed:
            if not self.waiting or not fits(self.waiting[0]):
                return None
            row = self.waiting.popleft()
            self._entries[row.id].begun = self._clock()
            return row

    def cancel(self, id: int) -> bool:
        """End a row that waits, and note that one under way is to leave; False where it has ended."""
        with self.changed:
            if id not in self._entries:
                return False
            waiting = next((row for row in self.waiting if row.id == id), None)
            if waiting is None:
                self._cancelled.add(id)
                self.changed.notify_all()
            else:
                self.waiting.remove(waiting)
                self.finish(waiting, "cancelled")
            return True

    def take_cancelled(self) -> set[int]:
        """Rows under way that are to leave."""
        with self.changed:
            cancelled, self._cancelled = self._cancelled, set()
            return cancelled

    def has(self, row: Row) -> bool:
        """Whether a row has not ended."""
        return row.id in self._entries

    def put(self, row: Row, tokens: list[int]) -> None:
        """Tell the owner about new tokens."""
        with self.changed:
            entry = self._entries[row.id]
            if math.isnan(entry.first):
                entry.first = self._clock()
            self.emitted_tokens += len(tokens)
            entry.handle._put(tokens)
            self.changed.notify_all()

    def finish(self, row: Row, reason: FinishReason) -> None:
        """Tell the owner that it is over."""
        with self.changed:
            now, entry = self._clock(), self._entries.pop(row.id)
            begun = now if math.isnan(entry.begun) else entry.begun
            completion = Completion(
                id=row.id,
                tokens=list(row.new),
                finish_reason=reason,
                stopped_by=row.stopped_by if reason == "stop" else None,
                error=row.error if reason == "error" else None,
                acceptance=acceptance_statistics([row.forwards[1:]], num_future_tokens=self._longest_draft + 1),
                prompt_tokens=len(row.request.prompt),
                seed=row.seed if row.request.sampled else None,
                queued_seconds=begun - entry.submitted,
                first_token_seconds=entry.first - entry.submitted,
                seconds=now - entry.submitted,
            )
            self.finished += 1
            entry.handle._finish(completion)
            self.changed.notify_all()

    def close(self) -> None:
        """Take no more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
