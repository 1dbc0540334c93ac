"""Tiny random models of every supported family, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.multi_token_lm import MultiTokenLM

VOCABULARY = 40

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,  # large, so that logits of random models differ well beyond rounding
}
_WIDE = _COMMON | {"intermediate_size": 64, "max_position_embeddings": 256}


def _two_kinds(window: int) -> dict[str, Any]:
    return {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": window}


FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_WIDE, num_key_value_heads=4),
    "llama-gqa-tied": lambda: LlamaConfig(**_WIDE, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-rope-scaled": lambda: LlamaConfig(
        **_WIDE,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral-sliding": lambda: MistralConfig(**_WIDE, num_key_value_heads=2, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**_WIDE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_WIDE, num_key_value_heads=2, head_dim=8),
    "qwen3-sliding": lambda: Qwen3Config(
        **_WIDE, num_key_value_heads=2, head_dim=8, use_sliding_window=True, max_window_layers=1, **_two_kinds(6)
    ),
    "gemma2": lambda: Gemma2Config(
        **_WIDE,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=2.0,
        **_two_kinds(6),
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_WIDE, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, **_two_kinds(6)
    ),
    "gemma3_text-capped": lambda: Gemma3TextConfig(
        **_WIDE,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "olmo2": lambda: Olmo2Config(**_WIDE, num_key_value_heads=4),
    "phi3": lambda: Phi3Config(**_WIDE, num_key_value_heads=2, sliding_window=6),
    "gpt_neox": lambda: GPTNeoXConfig(**_WIDE),
    "gpt_neox-tied": lambda: GPTNeoXConfig(**_WIDE, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
"""Name -> a function that makes a configuration of 3 layers; at least one entry per supported family."""


def tiny_base(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random causal LM of the family, in eval mode."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in overrides.items():
        setattr(config, name, value)
    base = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    # Norm weights of a fresh model are constant: make every parameter matter.
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return base


def tiny_model(
    family: str = "llama",
    *,
    num_future_tokens: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **mtp_options: Any,
) -> MultiTokenLM:
    """A random multi-token model of the family with heads that differ from the last layer, in eval mode."""
    base = tiny_base(family, dtype=dtype, seed=seed)
    options = {"head_init": "fresh"} | mtp_options
    return attach_heads(base, MultiTokenConfig(num_future_tokens=num_future_tokens, **options))


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the tiny vocabulary."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
