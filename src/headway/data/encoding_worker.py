"""The process that encodes pieces for the pool: it ends with its input.

Frames go both ways over the standard streams: a count, so many lengths, then so many contents. The first frame in is the
tokenizer: its definition, or its pickle where it has no `tokenizers` backend. Every other frame in is pieces of text and
is answered by a frame of their ids, uint32.
"""

from __future__ import annotations

import pickle
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from headway.data.text_encoder import TextEncoder

DEFINITION, PICKLE = b"definition", b"pickle"

_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")

Encode = Callable[[Sequence[bytes]], Sequence[Any]]


def read_frame(stream: BinaryIO) -> list[bytes] | None:
    """The next frame, None at the end of the stream or where it breaks off."""
    head = stream.read(_COUNT.size)
    if len(head) < _COUNT.size:
        return None
    (count,) = _COUNT.unpack(head)
    lengths = stream.read(_LENGTH.size * count)
    if len(lengths) < _LENGTH.size * count:
        return None
    contents = []
    for (length,) in _LENGTH.iter_unpack(lengths):
        content = stream.read(length)
        if len(content) < length:
            return None
        contents.append(content)
    return contents


def write_frame(stream: BinaryIO, contents: Sequence[bytes]) -> None:
    """Send a frame."""
    stream.write(_COUNT.pack(len(contents)))
    stream.write(b"".join(_LENGTH.pack(len(content)) for content in contents))
    for content in contents:
        stream.write(content)
    stream.flush()


def main(source: BinaryIO, target: BinaryIO) -> None:
    """Answer frames until there are no more."""
    first = read_frame(source)
    if first is None:
        return
    kind, content = first
    encode: Encode = TextEncoder(content.decode()).encode if kind == DEFINITION else _slow(pickle.loads(content))
    while (pieces := read_frame(source)) is not None:
        write_frame(target, [np.asarray(ids).astype("<u4").tobytes() for ids in encode(pieces)])


def _slow(tokenizer: Any) -> Encode:
    def encode(pieces: Sequence[bytes]) -> Sequence[Any]:
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        rows: Sequence[Any] = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return rows

    return encode


if __name__ == "__main__":
    # an interrupt is for the process that started this one; it closes the input when it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main(sys.stdin.buffer, sys.stdout.buffer)
