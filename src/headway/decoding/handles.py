"""One request as its owner sees it: tokens as they come, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Condition
from typing import TYPE_CHECKING

from headway.decoding.requests import Completion, Request
from headway.errors import DecodingError

if TYPE_CHECKING:
    from headway.decoding.scheduler import Scheduler


class RequestHandle:
    """What `Scheduler.submit` gives; safe to use from any thread.

    Iterating gives the tokens of every forward, a list each, as they come, and ends with the text. Where nobody runs the
    scheduler (`Scheduler.run` in another thread), whoever iterates or waits steps it, for all requests.

    Attributes:
        id: of the request, counted from 0.
        request: what was asked.
    """

    def __init__(self, scheduler: Scheduler, changed: Condition, id: int, request: Request) -> None:
        self.id = id
        self.request = request
        self._scheduler = scheduler
        self._changed = changed
        self._parts: list[list[int]] = []
        self._completion: Completion | None = None

    @property
    def finished(self) -> bool:
        """Whether it has ended, whatever the reason."""
        return self._completion is not None

    def cancel(self) -> bool:
        """See `Scheduler.cancel`."""
        return self._scheduler.cancel(self.id)

    def result(self, timeout: float | None = None) -> Completion:
        """What became of it, once it has ended; also where it was cancelled or failed.

        Args:
            timeout: seconds to wait for whoever runs the scheduler; None for ever.

        Raises:
            TimeoutError: it has not ended by then.
        """
        while self._completion is None:
            self._wait(None, timeout)
        return self._completion

    def __iter__(self) -> Iterator[list[int]]:
        """The tokens of each forward from the first on; every call begins anew.

        Raises:
            DecodingError: the request failed; the cause is what went wrong.
        """
        read = 0
        while True:
            while read < len(self._parts):
                yield self._parts[read]
                read += 1
            if self._completion is None:
                self._wait(read, None)
            elif read == len(self._parts):
                if self._completion.error is not None:
                    raise DecodingError(
                        f"request {self.id} failed: {self._completion.error}"
                    ) from self._completion.error
                return

    def _wait(self, read: int | None, timeout: float | None) -> None:
        """Wait for the end, or for more parts than were read; step where nobody else does."""

        def ready() -> bool:
            return self._completion is not None or (read is not None and len(self._parts) > read)

        with self._changed:
            driven = self._scheduler.running
            if driven and not self._changed.wait_for(lambda: ready() or not self._scheduler.running, timeout):
                raise TimeoutError(f"request {self.id} has not ended after {timeout} seconds; wait longer or cancel it")
        if not driven and not ready():
            self._scheduler.step()

    def _put(self, tokens: list[int]) -> None:
        self._parts.append(tokens)

    def _finish(self, completion: Completion) -> None:
        self._completion = completion
