"""Files that may be compressed, read as what they hold."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, cast

import zstandard

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile)
"""What reading a damaged compressed file raises, beside OSError."""

_BUFFER_BYTES = 1 << 20


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading; .gz, .xz and .zst are decompressed on the way.

    Raises:
        OSError: it cannot be opened. Reading may raise one of `DAMAGED`.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    file = path.open("rb", buffering=_BUFFER_BYTES)
    if suffix == ".zst":
        # several frames in one file are as usual as one, and the default stops after the first
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
            file, read_across_frames=True, closefd=True
        )
        return io.BufferedReader(cast(io.RawIOBase, reader), _BUFFER_BYTES)
    return file


def damage(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"is damaged ({' '.join(str(error).split()) or type(error).__name__})"
