"""Stop strings as a criterion of one text: transformers' own, made once per tokenizer and strings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers.generation.stopping_criteria import StopStringCriteria


@lru_cache(maxsize=64)
def stop_strings_criterion(tokenizer: Any, strings: tuple[str, ...]) -> StopStringCriteria:
    """The criterion that `generate(stop_strings=..., tokenizer=...)` would ask.

    Args:
        tokenizer: of the model.
        strings: one of them ends the text.
    """
    return StopStringCriteria(tokenizer, list(strings))
