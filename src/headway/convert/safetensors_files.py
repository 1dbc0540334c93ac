"""Safetensors files read and written one tensor at a time.

The format: eight bytes with the length of a JSON header (little-endian), the header with dtype, shape and byte range of
every tensor, then the values without gaps. Writing it by hand is what keeps one tensor in memory instead of one file;
the safetensors library, which reads it back everywhere else, takes whole files only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headway.convert.lazy_model import LazyTensor
from headway.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file by name; values stay on disk until they are read.

    Raises:
        CheckpointError: missing, truncated, or with a dtype that headway does not convert.
    """
    try:
        file: Any = safe_open(path, framework="pt")
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore it", path=path) from error
    return {name: _lazy(file, name, path) for name in names}


def _lazy(file: Any, name: str, path: Path) -> LazyTensor:
    view = file.get_slice(name)
    dtype = _DTYPES.get(view.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path} holds {name} as {view.get_dtype()}, which headway does not convert; convert an unquantised checkpoint",
            path=path,
        )

    def read() -> Tensor:
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} in {path} cannot be read: {error}; restore the file", path=path) from error
        return tensor

    return LazyTensor(shape=tuple(view.get_shape()), dtype=dtype, read=read)


def open_checkpoint(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of `model.safetensors`, or of all files that its index names.

    Raises:
        CheckpointError: no such files, a missing shard, an index that does not describe the files.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _open_shards(folder, _read_index(index))
    if (folder / SINGLE_FILE).is_file():
        return open_safetensors(folder / SINGLE_FILE)
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    found = (
        f"; it has {pickles[0]}, a pickle: load it with transformers and save_pretrained it again" if pickles else ""
    )
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}{found or '; restore them'}", path=folder)


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); restore it", path=path) from error
    for file in names.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path} names {file}, which is not a file beside it; restore it", path=path)
    return names


def _open_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} is half written: {file} is missing; restore it", path=folder / file)
        shard = open_safetensors(folder / file)
        listed = {name for name, where in weight_map.items() if where == file}
        if shard.keys() != listed:
            odd = sorted(shard.keys() ^ listed)
            raise CheckpointError(
                f"{folder / INDEX_FILE} and {file} disagree about {len(odd)} tensors (first: {odd[0]}); restore them",
                path=folder / file,
            )
        tensors |= shard
    return tensors


def writing_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Names as they are written: wide types first, so that values are aligned; by name within a type."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], *, written: Callable[[str, Tensor], None] | None = None
) -> None:
    """Write one file, one tensor in memory at a time.

    Args:
        path: a new file.
        tensors: by name.
        written: told each name and its values, in the order of `writing_order`.
    """
    order = writing_order(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.num_bytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            values = checked(tensors[name], name)
            file.write(raw_bytes(values))
            if written is not None:
                written(name, values)
            del values


def checked(tensor: LazyTensor, name: str) -> Tensor:
    """Read a tensor and hold it to what was announced.

    Raises:
        ValueError: another shape or dtype: a mistake of the format that made it.
    """
    values = tensor.read()
    if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
        raise ValueError(
            f"{name} was announced as {tensor.dtype} {tensor.shape}, its values are {values.dtype} {tuple(values.shape)}"
        )
    return values


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values' bytes, little-endian, in row-major order; no copy of a contiguous tensor."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    always_index: bool,
    max_shard_bytes: int | None = None,
    written: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Write `model.safetensors`, or shards with an index.

    Args:
        folder: where.
        tensors: by name on disk.
        always_index: write the index for a single file too.
        max_shard_bytes: most bytes of a file, unless one tensor is larger; `MAX_SHARD_BYTES` where not given.
        written: as for `write_safetensors`.
    """
    shards = _shards(tensors, MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, written=written)
        weight_map |= dict.fromkeys(shard, file)
    if always_index or len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    room = max_shard_bytes
    for name in writing_order(tensors):
        size = tensors[name].num_bytes
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensors[name]
        room -= size
    return shards
