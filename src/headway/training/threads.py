"""How many CPU threads torch computes with, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Compute with `count` threads inside the block, and with as many as before after it; None changes nothing."""
    former = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)
