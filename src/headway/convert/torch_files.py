"""Files of `torch.save` read without running code, and written one tensor at a time.

Such a file is a zip archive: a pickle of tensors whose storages are named, and one uncompressed entry per storage. It
is read by `torch.load(weights_only=True, mmap=True)` alone. It is written here entry by entry, since `torch.save` needs
every tensor in memory at once.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.convert.lazy_model import LazyTensor
from headway.convert.safetensors_files import checked, raw_bytes
from headway.errors import CheckpointError

_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_BYTES = 20


def open_torch_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that `torch.save` wrote from a flat state dict; values stay on disk until they are read.

    Raises:
        CheckpointError: the file would run code, is damaged, is older than torch 1.6, or is not a flat dict of tensors.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, and such a pickle can run code of its author when it is "
            f"loaded; get the weights as plain tensors or as safetensors",
            path=path,
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{path} cannot be read as tensors of torch.save ({reason}); restore it, or save it again with torch >= 1.6",
            path=path,
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(
            f"{path} is not a flat dict of tensors: got {type(state).__name__}"
            + (f" with {', '.join(map(str, list(state)[:5]))}" if isinstance(state, Mapping) else "")
            + "; save the model's own state dict",
            path=path,
        )
    return {str(name): _lazy(tensor) for name, tensor in state.items()}


def _lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


def write_torch_file(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write what `torch.save({name: tensor, ...}, path)` would, one tensor in memory at a time.

    Args:
        path: a new file.
        tensors: by name; floating-point types of 2 bytes or more.
    """
    order = sorted(tensors)
    with zipfile.ZipFile(path, "x", compression=zipfile.ZIP_STORED, allowZip64=True) as archive:
        top = path.stem
        _add(archive, f"{top}/data.pkl", memoryview(_pickled(tensors, order)))
        _add(archive, f"{top}/byteorder", memoryview(b"little"))
        for key, name in enumerate(order):
            values = checked(tensors[name], name)
            _add(archive, f"{top}/data/{key}", raw_bytes(values))
            del values
        _add(archive, f"{top}/version", memoryview(b"3\n"))


class _Storage:
    """Stands for a storage in the pickle: only its key, type and length are written."""

    def __init__(self, key: int, dtype: torch.dtype, length: int) -> None:
        self.persistent_id = ("storage", _STORAGES[dtype], str(key), "cpu", length)


class _Tensor:
    """Pickles as the call by which torch rebuilds a contiguous tensor from its storage."""

    def __init__(self, key: int, tensor: LazyTensor) -> None:
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = _Storage(key, tensor.dtype, math.prod(tensor.shape))
        hooks: OrderedDict[str, Any] = OrderedDict()
        self._arguments = (storage, 0, tensor.shape, tuple(strides), False, hooks)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _pickled(tensors: Mapping[str, LazyTensor], order: list[str]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({name: _Tensor(key, tensors[name]) for key, name in enumerate(order)})
    return buffer.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.file_size = data.nbytes
    large = data.nbytes > zipfile.ZIP64_LIMIT // 2
    assert archive.fp is not None
    # Values start at a multiple of 64 bytes, as torch writes them, so that they can be used where they lie in the file.
    unpadded = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + 4 + (_ZIP64_BYTES if large else 0)
    padding = -unpadded % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as target:
        target.write(data)
