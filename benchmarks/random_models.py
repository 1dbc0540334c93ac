"""Tiny random models for the random cases: every supported family and architecture of heads.

A model is named by a `ModelSpec`, which says everything about it; `build` makes the same weights from the same spec, in any
dtype. Weights are drawn large, so that logits differ well beyond rounding, and norms and biases are moved from their constants.
"""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"
POSITIONS = 256

HEADS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "transformer, 2 layers": {"layers_per_head": 2},
    "transformer, tap": {"tap_back": 1},
    "transformer, markov": {"markov_rank": 4},
    "causal": {"wiring": "causal"},
    "causal, markov": {"wiring": "causal", "markov_rank": 4},
    "anticausal": {"wiring": "anticausal", "allow_base_change": True},
    "linear": {"heads": "linear"},
    "linear, tap, markov": {"heads": "linear", "tap_back": 1, "markov_rank": 4},
    "replicated": {"heads": "replicated_unembedding"},
    "replicated, markov": {"heads": "replicated_unembedding", "markov_rank": 4},
    "medusa": {"heads": "medusa"},
    "medusa, shared, markov": {"heads": "medusa", "blocks_per_head": 2, "own_unembedding": False, "markov_rank": 4},
    "hydra": {"heads": "hydra"},
    "hydra, shared": {"heads": "hydra", "blocks_per_head": 2, "own_unembedding": False},
    "sequential": {"heads": "sequential"},
    "sequential, shared": {"heads": "sequential", "share_modules": True},
    "sequential, own norm": {"heads": "sequential", "own_output_norm": True},
    "sequential, fused, shared": {"heads": "sequential", "fuse_layers": True, "share_modules": True},
}
"""Name -> fields of `MultiTokenConfig`."""

FAMILIES = (
    *("llama", "llama, tied", "llama, scaled rope", "mistral, window", "qwen2", "qwen3", "qwen3, window", "olmo2"),
    *("phi3, window", "gemma2", "gemma3", "gpt_neox", "gpt2"),
)
LEAN = frozenset(
    name for name in FAMILIES if name.split(",")[0] in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3")
)


@dataclass(frozen=True)
class ModelSpec:
    """Everything about one tiny model.

    Attributes:
        family: one of `FAMILIES`.
        heads: one of `HEADS`.
        num_future_tokens: n.
        vocabulary: V.
        width: D.
        layers: of the base.
        seed: of its weights.
    """

    family: str
    heads: str
    num_future_tokens: int
    vocabulary: int
    width: int
    layers: int
    seed: int

    @property
    def lean(self) -> bool:
        """Whether a lean executor has to exist for it."""
        return self.family in LEAN

    @property
    def changes_base(self) -> bool:
        """Whether the base alone is another model."""
        return self.heads.startswith("anticausal")

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@functools.cache
def model_specs(count: int, seed: int) -> tuple[ModelSpec, ...]:
    """So many specs: architectures and families in turn, everything else drawn."""
    rng = random.Random(f"models {seed}")
    names, specs = list(HEADS), []
    for index in range(count):
        heads = names[index % len(names)]
        layers = 3 if "fused" in heads else rng.choice([2, 2, 2, 3])
        specs.append(
            ModelSpec(
                family=FAMILIES[(index + index // len(names)) % len(FAMILIES)],
                heads=heads,
                num_future_tokens=rng.choice([2, 3, 4, 4, 5, 8]),
                vocabulary=rng.choice([11, 17, 33, 64]),
                width=rng.choice([16, 32]),
                layers=layers,
                seed=rng.randrange(2**31),
            )
        )
    return tuple(specs)


@functools.cache
def build(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """The model, in eval mode; kept for the next case."""
    torch.manual_seed(spec.seed)
    base = AutoModelForCausalLM.from_config(_config(spec)).to(dtype).eval()
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    config = MultiTokenConfig(num_future_tokens=spec.num_future_tokens, head_init="fresh", **HEADS[spec.heads])
    model = attach_heads(base, config)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@functools.cache
def letters_tokenizer(vocabulary: int) -> Any:
    """A tokenizer whose token i is the letter i."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS[:vocabulary])}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _config(spec: ModelSpec) -> Any:
    name, _, variant = spec.family.partition(", ")
    common: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.25,
    }
    if name == "gpt2":
        sizes = {"n_embd": spec.width, "n_layer": spec.layers, "n_head": 4, "n_positions": POSITIONS}
        return GPT2Config(**common, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common |= {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * spec.width,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": variant == "tied",
    }
    if name == "gpt_neox":
        return GPTNeoXConfig(**common)
    common["num_key_value_heads"] = 4 if name == "olmo2" else 2
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    two_kinds = {"layer_types": kinds[-spec.layers :], "sliding_window": 6}
    if name == "llama":
        scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0}
        scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        return LlamaConfig(**common, **({"rope_parameters": scaled} if variant == "scaled rope" else {}))
    if name == "mistral":
        return MistralConfig(**common, sliding_window=6)
    if name == "qwen2":
        return Qwen2Config(**common)
    if name == "qwen3":
        windowed = {"use_sliding_window": True, "max_window_layers": 1, **two_kinds} if variant == "window" else {}
        return Qwen3Config(**common, head_dim=8, **windowed)
    if name == "olmo2":
        return Olmo2Config(**common)
    if name == "phi3":
        return Phi3Config(**common, sliding_window=6)
    common |= {"head_dim": 8, "query_pre_attn_scalar": 8}
    if name == "gemma2":
        return Gemma2Config(**common, final_logit_softcapping=4.0, **two_kinds)
    return Gemma3TextConfig(**common, **two_kinds)
