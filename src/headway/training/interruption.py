"""SIGTERM and SIGINT as a request to save and stop, not as the end of the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from headway.errors import TrainingError


class TrainingInterruptedError(TrainingError):
    """A run that a signal ended, saved and ready to be resumed.

    Attributes:
        signal_number: SIGINT or SIGTERM.
        step: steps that the checkpoint holds.
        checkpoint: the folder written.
    """

    def __init__(self, signal_number: int, *, step: int, checkpoint: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"{name}: saved step {step} to {checkpoint}; start the same command again to continue from there"
        )
        self.signal_number = signal_number
        self.step = step
        self.checkpoint = checkpoint


class StopRequest:
    """Whether a signal has asked the run to stop, and which one."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_on_signals(*, second_interrupts: bool = True) -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT inside the block into a request; the second SIGINT interrupts at once.

    Outside the main thread, where Python delivers no signals, the request simply never comes.

    Args:
        second_interrupts: off below a launcher, from which one Ctrl-C comes twice (from the terminal and from the launcher)
            and which kills what does not end.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None and signal_number == signal.SIGINT and second_interrupts:
            raise KeyboardInterrupt
        request.signal_number = signal_number

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
