"""Reading a long prompt in pieces, so that no forward is longer than a piece.

One forward over T tokens makes tensors of T rows in every layer, and T x T numbers where attention needs a mask (a window) or
writes its weights down ("eager"). A piece of c tokens makes c rows and c x T numbers; what earlier pieces said is in the cache.
"""

from __future__ import annotations

from typing import Any

DEFAULT_CHUNK_TOKENS = 1024
"""Tokens per piece: products are as efficient as they get well before that, and common prompts are one piece."""


def pieces(columns: int, chunk: int) -> list[tuple[int, int]]:
    """Start and end (excluded) of the pieces of a prompt.

    >>> pieces(10, 4)
    [(0, 4), (4, 8), (8, 10)]

    Args:
        columns: tokens to read.
        chunk: the most tokens of a piece, at least 1.
    """
    return [(start, min(start + chunk, columns)) for start in range(0, columns, chunk)]


def reads_at_once(config: Any) -> bool:
    """Whether a family's rotary frequencies depend on how far a forward reaches, so that a prompt must be one forward.

    >>> from transformers import LlamaConfig
    >>> reads_at_once(LlamaConfig())
    False

    Args:
        config: of the base.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return False
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    return any(parameters.get("rope_type") in ("dynamic", "longrope") for parameters in kinds)
