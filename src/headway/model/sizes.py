"""The model sizes of the paper's Table S14, as llama configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from headway.errors import ConfigError


@dataclass(frozen=True)
class PaperSize:
    """One row of Table S14.

    Attributes:
        dim: model width.
        layers: layers in all, the head layers counted (parameter parity).
        heads: attention heads.
    """

    dim: int
    layers: int
    heads: int


# Gloeckle et al. 2024, Table S14 (dim / layers / heads). "1M".."1B" are non-embedding counts, "0.3B".."13B" totals with a
# 32k vocabulary and untied embeddings (derived: 12 * layers * dim^2).
PAPER_SIZES: dict[str, PaperSize] = {
    "1M": PaperSize(128, 5, 4),
    "3M": PaperSize(256, 4, 8),
    "10M": PaperSize(384, 6, 8),
    "30M": PaperSize(512, 10, 8),
    "100M": PaperSize(768, 14, 12),
    "300M": PaperSize(1024, 25, 16),
    "1B": PaperSize(1536, 36, 24),
    "0.3B": PaperSize(1024, 18, 16),
    "0.6B": PaperSize(1280, 27, 20),
    "1.3B": PaperSize(2048, 24, 16),
    "3B": PaperSize(2560, 36, 20),
    "6.7B": PaperSize(4096, 32, 32),
    "13B": PaperSize(5120, 40, 40),
}


def feed_forward_width(dim: int) -> int:
    """SwiGLU width 8/3 dim, rounded up to a multiple of 256 (of 32 below width 1024), so that a layer has 12 dim^2 weights.

    The paper does not give it; this is the llama block that its parameter counts are consistent with.

    >>> feed_forward_width(4096), feed_forward_width(5120), feed_forward_width(128)
    (11008, 13824, 352)
    """
    multiple = 256 if dim >= 1024 else 32
    return -(-(8 * dim // 3 + (8 * dim % 3 > 0)) // multiple) * multiple


def paper_config(
    name: str, *, vocab_size: int = 32000, max_position_embeddings: int = 4096, **overrides: Any
) -> LlamaConfig:
    """The llama configuration of a size of Table S14; `num_hidden_layers` is L in all, as `MultiTokenLM.from_config` takes it.

    Args:
        name: a row's name, such as "0.3B".
        vocab_size: tokens; the paper's code models use 32k.
        max_position_embeddings: longest context; 4096 in most of Table S13.
        overrides: any further llama field.

    Raises:
        ConfigError: no such row.
    """
    if name not in PAPER_SIZES:
        raise ConfigError(f"unknown model size {name!r}; Table S14 has {', '.join(PAPER_SIZES)}")
    size = PAPER_SIZES[name]
    fields: dict[str, Any] = {
        "hidden_size": size.dim,
        "intermediate_size": feed_forward_width(size.dim),
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,  # footnote 1, section 4.1
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**(fields | overrides))
