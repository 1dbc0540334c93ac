"""The cache of a pass in which heads run: their keys and values live at layer indices L, L + 1, ..."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache

from headway.errors import ConfigError
from headway.heads.base import Heads


def cache_for_heads(
    past_key_values: Any | None,
    heads: Heads,
    *,
    num_heads: int,
    base_layers: int,
    architecture: str,
    build: bool,
) -> Any | None:
    """The cache that base and heads share in one pass: the given one where it has room, or a new one.

    Args:
        past_key_values: what the caller passed.
        heads: of the model.
        num_heads: n - 1.
        base_layers: L.
        architecture: name of the heads, for messages.
        build: whether to make a cache where none was passed; one made from the base's config would have L layers only.

    Raises:
        ConfigError: a cache without room for the heads, one that they did not fill, or one that they cannot continue.
    """
    needed = heads.cache_layers(num_heads)
    if past_key_values is None:
        return DynamicCache() if build and needed and not heads.reads_tokens else None
    if isinstance(past_key_values, DynamicCache) and needed:
        seen = past_key_values.get_seq_length()
        if heads.reads_tokens:
            if seen:
                raise ConfigError(
                    f"{architecture} heads cannot continue a cache: their keys and values depend on tokens that come "
                    f"later; pass the whole text without past_key_values, or use generate"
                )
            return past_key_values
        filled = past_key_values.get_seq_length(base_layers) if len(past_key_values.layers) > base_layers else 0
        if filled != seen or getattr(past_key_values, "layer_class_to_replicate", True) is None:
            raise ConfigError(
                f"this cache has no room for the heads' keys and values, or holds {seen} tokens of the base and "
                f"{filled} of the heads; pass transformers.DynamicCache() without a config, filled by calls with "
                f"return_future_logits=True"
            )
    return past_key_values
