"""Pieces of text to ids by the `tokenizers` library alone, which is all a worker loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


class TextEncoder:
    """Encodes pieces decoded as UTF-8, undecodable bytes becoming U+FFFD; neither adds nor recognises special tokens.

    Args:
        definition: the tokenizer as `tokenizers` writes it (tokenizer.json).
    """

    def __init__(self, definition: str) -> None:
        self._backend: Any = Tokenizer.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True

    def encode(self, pieces: Sequence[bytes]) -> list[npt.NDArray[Any]]:
        """Ids of each piece."""
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
