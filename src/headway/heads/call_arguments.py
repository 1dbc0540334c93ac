"""Arguments of a decoder layer's call, by name and at other positions of the same rows.

Legend: B batch, T positions of the call, X positions of another call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import ConfigError

MASK = "attention_mask"
_ALONG_POSITIONS = ("position_ids", "position_embeddings", "cache_position")


def by_name(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of such a layer but its hidden states."""
    names = list(inspect.signature(type(layer).forward).parameters)[2 : 2 + len(args)]
    return {**dict(zip(names, args, strict=True)), **kwargs}


def at_columns(arguments: Mapping[str, Any], columns: Tensor, mask: Tensor | None, *, instead: str) -> dict[str, Any]:
    """The arguments of a call at other positions, under another mask.

    Args:
        arguments: by name.
        columns: which of the T positions stands at each new one: [X], or [B, X] where rows differ.
        mask: [B, 1, X, slots] of the kind that the call had, or None.
        instead: what to do where this cannot be done.

    Raises:
        ConfigError: a family whose layers get per-position arguments that are not known here.
    """
    moved: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == MASK:
            moved[name] = mask
        elif name in _ALONG_POSITIONS:
            moved[name] = select(value, columns)
        elif isinstance(value, Tensor):
            raise ConfigError(
                f"layers of this family get {name} of shape {tuple(value.shape)}, which cannot be moved to other positions; "
                f"{instead}"
            )
        else:
            moved[name] = value
    return moved


def select(value: Any, columns: Tensor) -> Any:
    """Positions of a tensor [B or 1, T, ...], or of several; anything else is left as it is.

    >>> select(torch.tensor([[10, 11, 12]]), torch.tensor([[0, 2], [1, 1]]))
    tensor([[10, 12],
            [11, 11]])
    """
    if isinstance(value, tuple | list):
        return type(value)(select(item, columns) for item in value)
    if not isinstance(value, Tensor):
        return value
    if columns.ndim == 1:
        return value.index_select(min(1, value.ndim - 1), columns)
    rows_B1 = torch.arange(columns.shape[0], device=columns.device)[:, None]
    return value.expand(columns.shape[0], *value.shape[1:])[rows_B1, columns]
