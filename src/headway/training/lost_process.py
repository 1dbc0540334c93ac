"""Losing another process of the run, told as what happened and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from headway.errors import HeadwayError, TrainingError
from headway.processes import Processes

# What gloo, NCCL and the rendezvous store say inside a RuntimeError when the other side is gone or does not answer.
_BROKEN = ("gloo", "NCCL", "ProcessGroup", "Connection", "TCPStore", "Broken pipe", "wait timeout", "Timed out")


@contextmanager
def lost_process_explained(processes: Processes, doing: Callable[[], str]) -> Iterator[None]:
    """Turn a connection that broke inside the block into one sentence.

    Args:
        processes: of the run; nothing is done where this is the only one.
        doing: what the process was about, asked when it failed ("step 12").

    Raises:
        TrainingError: in the place of the connection's error.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HeadwayError) or not processes.several or not _is_broken_connection(error):
            raise
        raise TrainingError(
            f"lost another of the {processes.count} processes in {doing()} ({_reason(error)}); its own message or the "
            f"launcher's says why: start the same command again, it goes on from the last checkpoint"
        ) from error


def _reason(error: RuntimeError) -> str:
    # The rest of such a message is about sockets, ranks of helper groups and where to report bugs.
    known = re.search(
        r"connection [a-z]+ by peer|connection refused|broken pipe|timed out|timeout", str(error), re.IGNORECASE
    )
    return known[0].lower() if known else (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _is_broken_connection(error: RuntimeError) -> bool:
    # DistError is torch's own class where it has one; gloo raises plain RuntimeErrors.
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _BROKEN)
