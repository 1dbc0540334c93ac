"""Prompts as they come from a command line: an argument, a file or a pipe.

A prompt is bytes until a tokenizer sees it, so that a byte model can be given any file at all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


def read_prompt(argument: str | None, file: Path | None) -> bytes:
    """The prompt's bytes, exactly as given (a file's last line feed included).

    Args:
        argument: text of the command line; bytes of it that are not UTF-8 come back as they were typed.
        file: a file to read instead.

    Raises:
        ConfigError: both, or neither and stdin is a terminal.
        DataError: a file that cannot be read, or an empty prompt.
    """
    if argument is not None and file is not None:
        raise ConfigError("a prompt comes from one place: got PROMPT and --file; leave one of them out")
    if argument is not None:
        data, place = os.fsencode(argument), "PROMPT"
    elif file is not None:
        data, place = _read_file(file), str(file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there is no prompt: pass PROMPT, --file F, or pipe text in")
    else:
        data, place = sys.stdin.buffer.read(), "stdin"
    if not data:
        raise DataError(f"the prompt is empty ({place}); pass at least one character to continue")
    return data


def encode_prompt(data: bytes, tokenizer: Any) -> Tensor:
    """Token ids [1, T] of a prompt: its bytes for the byte tokenizer, else what the tokenizer makes of UTF-8 text.

    Raises:
        DataError: bytes that are not UTF-8 for a tokenizer of text, or a text that has no tokens.
    """
    import torch

    from headway.data.tokenizers import encode_bytes, is_byte_tokenizer

    if is_byte_tokenizer(tokenizer):
        return torch.from_numpy(encode_bytes(data).astype("int64"))[None]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the prompt is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}) and this model's tokenizer "
            f"reads text; convert it, or use a byte model"
        ) from error
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"the prompt has no tokens: {text[:40]!r} is nothing to this tokenizer; pass another text")
    return torch.tensor([ids], dtype=torch.long)


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}; check the path") from error
