"""Parameters and memory of a multi-token model, without allocating any of it.

Models are built on torch's meta device: the counts are those of the real classes, tied weights counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM


@dataclass(frozen=True)
class CacheFootprint:
    """Keys and values that decoding keeps, heads included.

    Attributes:
        layers: layers with a cache: the base's and the heads' (n - 1 with one decoder layer per head).
        sliding_layers: those of them that look back only `sliding_window` tokens (heads look back like the last layer).
        sliding_window: tokens; None where no layer slides.
        bytes_per_token: keys and values of one token of one row in all layers.
    """

    layers: int
    sliding_layers: int
    sliding_window: int | None
    bytes_per_token: int

    def total_bytes(self, *, context_length: int, batch_size: int = 1) -> int:
        """Bytes of `batch_size` rows of `context_length` tokens, every layer keeping every token (headway's cache)."""
        return self.bytes_per_token * context_length * batch_size

    def windowed_bytes(self, *, context_length: int, batch_size: int = 1) -> int:
        """The same for a cache whose sliding layers forget what their window has left behind."""
        per_layer = self.bytes_per_token // self.layers
        window = context_length if self.sliding_window is None else min(context_length, self.sliding_window)
        kept = (self.layers - self.sliding_layers) * context_length + self.sliding_layers * window
        return per_layer * kept * batch_size


@dataclass(frozen=True)
class ModelFootprint:
    """What a multi-token model weighs.

    Attributes:
        total_parameters: every weight once, heads included.
        embedding_parameters: token embedding, and position embedding where the family learns one.
        unembedding_parameters: the output matrix; 0 where it is tied to the token embedding.
        head_parameters: heads of offsets 2..n alone, with unembeddings of their own where they have them.
        layers: decoder layers, those of the heads included.
        head_layers: of them, those of the heads.
        dtype: of weights and cache.
        cache: keys and values.
    """

    total_parameters: int
    embedding_parameters: int
    unembedding_parameters: int
    head_parameters: int
    layers: int
    head_layers: int
    dtype: torch.dtype
    cache: CacheFootprint

    @property
    def non_embedding_parameters(self) -> int:
        """All but embeddings and unembedding: the layers, heads included, and the norms."""
        return self.total_parameters - self.embedding_parameters - self.unembedding_parameters

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in `dtype`."""
        return self.total_parameters * self.dtype.itemsize


def footprint(base_config: Any, mtp_config: MultiTokenConfig, *, dtype: torch.dtype) -> ModelFootprint:
    """The footprint of `MultiTokenLM.from_config(base_config, mtp_config)`.

    Args:
        base_config: Hugging Face configuration whose `num_hidden_layers` is L in all, heads counted.
        mtp_config: the heads.
        dtype: of weights and cache.

    Raises:
        ConfigError: n larger than the layers allow.
        IncompatibleModelError: a family that heads cannot be attached to.
    """
    with torch.device("meta"):
        model = MultiTokenLM.from_config(base_config, mtp_config)
    return model_footprint(model, dtype=dtype)


def attached_footprint(base_config: Any, mtp_config: MultiTokenConfig, *, dtype: torch.dtype) -> ModelFootprint:
    """The footprint of `attach_heads` on an intact base of this configuration.

    Args:
        base_config: configuration of the base as it is saved; the heads come on top of its layers.
        mtp_config: the heads.
        dtype: of weights and cache.

    Raises:
        IncompatibleModelError: a family that heads cannot be attached to.
    """
    with torch.device("meta"):
        model = attach_heads(AutoModelForCausalLM.from_config(base_config), mtp_config)
    return model_footprint(model, dtype=dtype)


def model_footprint(model: MultiTokenLM, *, dtype: torch.dtype) -> ModelFootprint:
    """The footprint of this model if its weights and its cache were held in `dtype`."""
    embedding = {id(m.weight): m.weight.numel() for m in model.base.modules() if isinstance(m, nn.Embedding)}
    unembedding = model.base.get_output_embeddings().weight
    return ModelFootprint(
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_parameters=sum(embedding.values()),
        unembedding_parameters=0 if id(unembedding) in embedding else unembedding.numel(),
        head_parameters=sum(parameter.numel() for parameter in model.heads.parameters()),
        layers=len(model.family.layers) + len(model.heads.decoder_layers),
        head_layers=len(model.heads.decoder_layers),
        dtype=dtype,
        cache=cache_footprint(
            model.base.config,
            model.num_future_tokens,
            dtype=dtype,
            num_head_layers=model.heads.cache_layers(model.num_future_tokens - 1),
        ),
    )


def cache_footprint(
    base_config: Any, num_future_tokens: int, *, dtype: torch.dtype, num_head_layers: int | None = None
) -> CacheFootprint:
    """The cache of a base of this configuration with heads for `num_future_tokens`.

    Args:
        base_config: configuration of the base as it is saved.
        num_future_tokens: n, the next token included.
        dtype: of keys and values.
        num_head_layers: cache layers of the heads, where it is not one for each.
    """
    num_heads = num_future_tokens - 1 if num_head_layers is None else num_head_layers
    window = getattr(base_config, "sliding_window", None)
    types = list(getattr(base_config, "layer_types", None) or [])
    if types:
        sliding = [kind == "sliding_attention" for kind in types + types[-1:] * num_heads]
    else:
        sliding = [bool(window)] * (base_config.num_hidden_layers + num_heads)
    return CacheFootprint(
        layers=len(sliding),
        sliding_layers=sum(sliding),
        sliding_window=window if any(sliding) else None,
        bytes_per_token=kv_bytes_per_token(base_config, num_heads + 1, dtype),
    )


def kv_bytes_per_token(base_config: Any, num_future_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one token: 2 x (L_base + n - 1) layers x key-value heads x head width x bytes per number.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    >>> kv_bytes_per_token(config, 4, torch.float16)  # 2 x 6 layers x 2 heads x 16 wide x 2 bytes
    768

    Args:
        base_config: configuration of the base as it is saved.
        num_future_tokens: n, the next token included.
        dtype: of keys and values.
    """
    heads = getattr(base_config, "num_key_value_heads", None) or base_config.num_attention_heads
    width = getattr(base_config, "head_dim", None) or base_config.hidden_size // base_config.num_attention_heads
    layers = base_config.num_hidden_layers + num_future_tokens - 1
    return int(2 * layers * heads * width * dtype.itemsize)
