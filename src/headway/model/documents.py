"""Keeping packed documents apart in attention, whatever mask the caller passes.

Legend: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.errors import ConfigError
from headway.functional.targets import document_keys

AttentionMask = Tensor | dict[str, Tensor] | None
"""What a family's forward takes: [B, T], [B, 1, T, T], or one [B, 1, T, T] per layer type."""


def positions_from_documents(document_ids_BT: Tensor) -> Tensor:
    """Position ids that restart at 0 where the document id changes.

    >>> positions_from_documents(torch.tensor([[7, 7, 7, 9, 9]]))
    tensor([[0, 1, 2, 0, 1]])
    """
    length = document_ids_BT.shape[1]
    index_T = torch.arange(length, device=document_ids_BT.device)
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return index_T - torch.where(starts_BT, index_T, 0).cummax(dim=1).values


def spans_documents(keys: list[Tensor], attention_mask_BT: Tensor | None) -> bool:
    """Whether some row holds tokens of more than one document; padding does not count. Waits for the device once."""
    mixed = torch.zeros((), dtype=torch.bool)
    for keys_BT in keys:
        if attention_mask_BT is None:
            different = (keys_BT != keys_BT[:, :1]).any()
        else:
            present = attention_mask_BT.to(keys_BT.device).bool()
            low = keys_BT.masked_fill(~present, torch.iinfo(keys_BT.dtype).max).amin(dim=1)
            high = keys_BT.masked_fill(~present, torch.iinfo(keys_BT.dtype).min).amax(dim=1)
            different = (low < high).any()
        mixed = mixed.to(different.device) | different
    return bool(mixed)


def isolating_mask(
    config: Any,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    attention_mask_BT: AttentionMask,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
) -> AttentionMask:
    """The mask under which documents packed into a row do not see each other, or the given mask where none are packed.

    Combines causality, the family's sliding window, padding and documents into what the family's forward takes as is:
    one [B, 1, T, T] mask, or one per layer type. A padding position sees only itself, so that no softmax is empty.

    Raises:
        ConfigError: packed documents with an attention implementation that takes no such mask, or with a mask that is
            already [B, 1, T, T].
    """
    keys = document_keys(shape, position_ids_BT=position_ids_BT, document_ids_BT=document_ids_BT, device=device)
    if not keys:
        return attention_mask_BT
    if isinstance(attention_mask_BT, dict) or (attention_mask_BT is not None and attention_mask_BT.ndim != 2):
        # The caller built the whole mask; who else may see whom is theirs to say.
        return attention_mask_BT
    if not spans_documents(keys, attention_mask_BT):
        return attention_mask_BT
    check_pair_masks(config, "packed documents")
    visible_BTT = visible_pairs(shape, keys, attention_mask_BT=attention_mask_BT, device=device)
    return masks_by_layer_type(
        config, lambda window: as_mask(config, within_window(visible_BTT, window)[:, None], dtype=dtype)
    )


def check_pair_masks(config: Any, what: str) -> None:
    """Refuse an attention implementation that takes no mask per token pair.

    Raises:
        ConfigError: names `what` needs one.
    """
    implementation = getattr(config, "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"{what} need attn_implementation 'sdpa' or 'eager': got {implementation!r}, which takes no mask per token pair; "
            f"load the model with attn_implementation='sdpa'"
        )


def visible_pairs(
    shape: tuple[int, int], keys: list[Tensor], *, attention_mask_BT: Tensor | None, device: torch.device
) -> Tensor:
    """Which position (dimension 1) may look at which (dimension 2), windows apart: bool [B, T, T]."""
    index_T = torch.arange(shape[1], device=device)
    visible_BTT = (index_T[None] <= index_T[:, None]).expand(shape[0], shape[1], shape[1])
    for keys_BT in keys:
        visible_BTT = visible_BTT & (keys_BT[:, :, None] == keys_BT[:, None, :])
    if attention_mask_BT is not None:
        present = attention_mask_BT.to(device).bool()
        visible_BTT = visible_BTT & present[:, None, :] & present[:, :, None]
        visible_BTT = visible_BTT | (index_T[None] == index_T[:, None])
    return visible_BTT


def within_window(visible_BTT: Tensor, window: int | None) -> Tensor:
    """Of these pairs, those at most `window` positions apart, a position itself counted."""
    if window is None:
        return visible_BTT
    index_T = torch.arange(visible_BTT.shape[1], device=visible_BTT.device)
    return visible_BTT & (index_T[None] > index_T[:, None] - window)


def as_mask(config: Any, visible: Tensor, *, dtype: torch.dtype) -> Tensor:
    """True where a pair is visible -> what the attention implementation takes."""
    if getattr(config, "_attn_implementation", "eager") == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def masks_by_layer_type(config: Any, build: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
    """One mask per layer type where the family tells its layers apart, else one for all.

    Args:
        config: the base's configuration.
        build: window (tokens that a position sees, itself included; None for all) -> mask.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return build(window)
    return {kind: build(window if kind == "sliding_attention" else None) for kind in sorted(set(layer_types))}


def isolating_mask_or_cache(
    config: Any,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: AttentionMask,
    position_ids_BT: Tensor | None,
    document_ids_BT: Tensor | None,
    past_key_values: Any | None,
) -> AttentionMask:
    """`isolating_mask`, and the given mask unchanged where the pass continues a cache.

    Raises:
        ConfigError: as `isolating_mask`; several documents in a row with a cache that already holds tokens.
    """
    seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    mask = isolating_mask(
        config,
        shape=shape,
        dtype=dtype,
        device=device,
        attention_mask_BT=attention_mask if seen == 0 else None,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
    )
    if seen == 0:
        return mask
    if mask is not None:
        raise ConfigError(
            f"several documents in a row cannot continue a cache: it holds {seen} tokens; pass the documents without "
            f"past_key_values, or one document per row"
        )
    return attention_mask
