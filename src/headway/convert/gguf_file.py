"""GGUF files, version 3: what llama.cpp reads. Metadata, then tensors in float32, bfloat16 or Q8_0.

Source: ggml, docs/gguf.md; of Q8_0 ggml-quants.c (blocks of 32 values: a float16 scale, then 32 signed bytes).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from headway.convert.lazy_model import LazyTensor
from headway.errors import ConfigError

Precision = Literal["f32", "bf16", "q8_0"]
PRECISIONS: tuple[Precision, ...] = ("f32", "bf16", "q8_0")

VERSION, ALIGNMENT = 3, 32
BLOCK = 32
"""Values that share a scale in Q8_0."""

_TENSOR_TYPES: dict[Precision, int] = {"f32": 0, "bf16": 30, "q8_0": 8}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Unsigned:
    """A whole number that is stored as uint32, as llama.cpp wants most of them."""

    value: int


Value = Unsigned | bool | float | str | Sequence[str] | Sequence[float] | Sequence[int]


def write_gguf(
    file: Path, metadata: Mapping[str, Value], tensors: Mapping[str, LazyTensor], *, precision: Precision
) -> None:
    """Write a file whole or not at all, one tensor in memory at a time.

    Matrices get the asked precision; vectors (norms) stay float32, as llama.cpp's own quantization leaves them.

    Args:
        file: to write.
        metadata: keys and values in order.
        tensors: names as llama.cpp knows them.
        precision: of the matrices.

    Raises:
        ConfigError: rows that Q8_0 cannot hold, since their length is no multiple of 32.
    """
    precisions: dict[str, Precision] = {
        name: precision if len(tensor.shape) > 1 else "f32" for name, tensor in tensors.items()
    }
    head = bytearray(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    offset = 0
    for name, tensor in tensors.items():
        rank = len(tensor.shape)
        head += _string(name) + struct.pack("<I", rank)
        head += struct.pack(f"<{rank}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", _TENSOR_TYPES[precisions[name]], offset)
        size = encoded_bytes(name, tensor.shape, precisions[name])
        offset += size + _padding(size)
    head += bytes(_padding(len(head)))
    aside = file.with_name(f".{file.name}.writing")
    with aside.open("wb") as stream:
        stream.write(head)
        for name, tensor in tensors.items():
            data = encoded(name, tensor.read(), precisions[name])
            stream.write(data)
            stream.write(bytes(_padding(len(data))))
    aside.replace(file)


def encoded_bytes(name: str, shape: Sequence[int], precision: Precision) -> int:
    """Bytes of `encoded`; `name` is for messages.

    Raises:
        ConfigError: see `write_gguf`.
    """
    count = math.prod(shape)
    if precision != "q8_0":
        return count * {"f32": 4, "bf16": 2}[precision]
    if shape[-1] % BLOCK:
        raise ConfigError(
            f"Q8_0 holds rows in blocks of {BLOCK}: {name} has rows of {shape[-1]}; write f32 or bf16 instead"
        )
    return count // BLOCK * (BLOCK + 2)


def encoded(name: str, tensor: Tensor, precision: Precision) -> bytes:
    """A tensor's values as a file holds them; `name` is for messages.

    Raises:
        ConfigError: see `write_gguf`.
    """
    values = tensor.detach().to(torch.float32).contiguous()
    if precision == "bf16":
        return values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    if precision == "f32":
        return values.numpy().tobytes()
    encoded_bytes(name, values.shape, precision)
    blocks = values.reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    whole = torch.where(scales > 0, blocks / scales, torch.zeros_like(blocks)).round().to(torch.int8)
    parts = torch.cat((scales.to(torch.float16).view(torch.uint8), whole.view(torch.uint8)), dim=1)
    return parts.contiguous().numpy().tobytes()


UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}
"""Numbers of `general.file_type` whose matrices hold every value by itself."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def file_type(file: Path) -> int | None:
    """`general.file_type` of any GGUF file; None where it does not tell, or is none.

    Args:
        file: only its metadata is read.
    """
    try:
        with file.open("rb") as stream:
            magic, _, _, count = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF":
                return None
            for _ in range(count):
                key = _read_string(stream)
                (kind,) = struct.unpack("<I", stream.read(4))
                if key == b"general.file_type" and kind == _UINT32:
                    return int(struct.unpack("<I", stream.read(4))[0])
                _skip(stream, kind)
    except (OSError, struct.error, KeyError):
        return None
    return None


def _read_string(stream: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", stream.read(8))
    return stream.read(length)


def _skip(stream: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _read_string(stream)
    elif kind == _ARRAY:
        inner, count = struct.unpack("<IQ", stream.read(12))
        if inner in (_STRING, _ARRAY):
            for _ in range(count):
                _skip(stream, inner)
        else:
            stream.seek(count * _SIZES[inner], 1)
    else:
        stream.seek(_SIZES[kind], 1)


def _padding(length: int) -> int:
    return -length % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    kind, data = _scalar(value) if isinstance(value, Unsigned | bool | float | str) else (_ARRAY, _array(value))
    return struct.pack("<I", kind) + data


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, Unsigned):
        return _UINT32, struct.pack("<I", value.value)
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, int):
        return _INT32, struct.pack("<i", value)
    return _STRING, _string(value)


def _array(values: Sequence[Any]) -> bytes:
    items = [_scalar(value) for value in values]
    return struct.pack("<IQ", items[0][0], len(items)) + b"".join(data for _, data in items)
