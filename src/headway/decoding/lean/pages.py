"""Weights in huge pages: reading them then costs few translations of addresses.

A step of decoding reads every weight once, and memory in pages of 4 KiB is read at half the speed on some machines, virtual ones
above all (`docs/decisions/0012-lean-executor.md` has figures). Weights arrive in whatever memory the loader took; here they are
moved, not copied: each parameter gets the same numbers at a new place, and the old place is given back.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import weakref
from pathlib import Path

import torch
from torch import Tensor, nn

from headway.decoding.room import free_bytes

HUGE_PAGE = 2 * 2**20
_LINE = 64
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_moved: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()


def move_to_huge_pages(model: nn.Module) -> int:
    """Move a model's parameters to memory in huge pages, where the system has such memory.

    Tied parameters stay tied, and values, gradients and optimizers are not touched. Nothing happens to models that lie
    elsewhere than on the CPU or in parts of each other, nor where there is no room for a moment of both.

    Args:
        model: not in use by another thread.

    Returns:
        Bytes that lie in huge pages now; 0 where nothing was moved.
    """
    parameters = list(model.parameters())
    size = sum(-(-_bytes(parameter) // _LINE) * _LINE for parameter in parameters)
    if _moved.get(model) == _places(parameters):
        return size
    if not all(_is_plain(parameter) for parameter in parameters) or _overlap(parameters) or not _allowed():
        return 0
    room = free_bytes(torch.device("cpu"))
    if size < HUGE_PAGE or (room is not None and room < 2 * size):
        return 0
    arena, place = _arena(size)
    with torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            # One storage each, as before: whoever saves a model takes tensors in one storage for shared weights.
            new = torch.frombuffer(arena, dtype=parameter.dtype, count=parameter.numel(), offset=place)
            new = new.view(parameter.shape).copy_(parameter)
            place += -(-_bytes(parameter) // _LINE) * _LINE
            parameter.data = new
    _moved[model] = _places(parameters)
    return size


def huge_pages(num_bytes: int) -> Tensor:
    """A uint8 tensor [num_bytes] in huge pages where the system has them."""
    arena, place = _arena(num_bytes)
    return torch.frombuffer(arena, dtype=torch.uint8, count=num_bytes, offset=place)


def _arena(size: int) -> tuple[mmap.mmap, int]:
    """Fresh memory, and the place in it where whole huge pages begin."""
    arena = mmap.mmap(-1, (size // HUGE_PAGE + 2) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _allowed():
        arena.madvise(mmap.MADV_HUGEPAGE)
    return arena, -ctypes.addressof(ctypes.c_char.from_buffer(arena)) % HUGE_PAGE


def _allowed() -> bool:
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _is_plain(parameter: Tensor) -> bool:
    return (
        parameter.device.type == "cpu"
        and parameter.layout == torch.strided
        and parameter.is_contiguous()
        and parameter.numel() > 0
        and not parameter.is_inference()
        and type(parameter) is nn.Parameter
    )


def _overlap(parameters: list[nn.Parameter]) -> bool:
    spans = sorted((parameter.data_ptr(), parameter.data_ptr() + _bytes(parameter)) for parameter in parameters)
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans))


def _places(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in parameters)


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()
