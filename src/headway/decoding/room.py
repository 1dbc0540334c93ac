"""Whether the cache of a generation fits into memory, told before the generation starts.

The cache grows with the text, so running out of memory would come late, after minutes of work; its size at the limit is
known in advance.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from headway.errors import DecodingError
from headway.model.memory import cache_footprint

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device; None where nobody tells.

    On CUDA: what the driver has, and what torch has reserved and does not use. On the CPU: what the kernel calls available,
    and no more than the control group (a container) may still take.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [number for number in (_available(), _left_in_group()) if number is not None]
    return min(known) if known else None


def _available() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _left_in_group() -> int | None:
    """Of a version 2 control group; pages of files that were not used lately can be taken back."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        files = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(files.get("inactive_file", 0)))


def check_room(model: Any, *, batch: int, capacity: int, num_head_layers: int, max_new_tokens: int) -> None:
    """Refuse a generation whose cache cannot fit.

    Args:
        model: what runs, as an executor gets it.
        batch: B.
        capacity: slots of a row at the limit.
        num_head_layers: cache layers of the heads.
        max_new_tokens: the most tokens a row can get.

    Raises:
        DecodingError: the bytes needed, the bytes free, and what would need less.
    """
    weight = model.get_input_embeddings().weight
    spread = getattr(getattr(model, "base", None), "hf_device_map", None) or {}
    # Layers on several devices have their caches there.
    free = free_bytes(weight.device) if len(set(spread.values())) <= 1 else None
    if free is None:
        return
    cache = cache_footprint(model.config, 1, dtype=weight.dtype, num_head_layers=num_head_layers)
    needed = cache.total_bytes(context_length=capacity, batch_size=batch)
    if needed <= free:
        return
    fits = max_new_tokens - capacity + free // (cache.bytes_per_token * batch)
    shorter = f"max_new_tokens={fits} or less" if fits >= 1 else "shorter prompts"
    raise DecodingError(
        f"keys and values of {batch} x {capacity} tokens in {cache.layers} layers ({weight.dtype}) take "
        f"{_human(needed)} ({needed} bytes), and {_human(free)} ({free} bytes) are free on {weight.device}; pass "
        f"{shorter}, fewer rows at once, or load the model in a dtype of fewer bytes"
    )


def _human(number: int) -> str:
    """Bytes as people write them.

    >>> _human(3 * 2**30)
    '3.00 GiB'
    """
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
