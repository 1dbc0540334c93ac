"""Measurements as JSON documents."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def json_ready(value: Any) -> Any:
    """The value in plain lists, dicts and scalars; NaN and infinities become None, since JSON has none.

    >>> json_ready({"rate": (0.5, float("nan"))})
    {'rate': [0.5, None]}

    Args:
        value: a dataclass instance, mapping, sequence or scalar, nested as deep as need be.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_ready(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
