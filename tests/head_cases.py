"""Every head architecture with options that matter, as tiny models whose every weight counts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from headway.model.multi_token_lm import MultiTokenLM
from tiny_models import tiny_model

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "transformer": {},
    "transformer-2-layers": {"layers_per_head": 2},
    "transformer-tap": {"tap_back": 1},
    "transformer-markov": {"markov_rank": 4},
    "causal": {"wiring": "causal"},
    "causal-2-layers-markov": {"wiring": "causal", "layers_per_head": 2, "markov_rank": 4},
    "anticausal": {"wiring": "anticausal", "allow_base_change": True},
    "anticausal-markov": {"wiring": "anticausal", "allow_base_change": True, "markov_rank": 4},
    "linear": {"heads": "linear"},
    "linear-tap-markov": {"heads": "linear", "tap_back": 1, "markov_rank": 4},
    "replicated": {"heads": "replicated_unembedding"},
    "replicated-markov": {"heads": "replicated_unembedding", "markov_rank": 4},
    "medusa": {"heads": "medusa"},
    "medusa-2-blocks-shared-markov": {
        "heads": "medusa",
        "blocks_per_head": 2,
        "own_unembedding": False,
        "markov_rank": 4,
    },
    "hydra": {"heads": "hydra"},
    "hydra-2-blocks-shared": {"heads": "hydra", "blocks_per_head": 2, "own_unembedding": False},
    "sequential": {"heads": "sequential"},
    "sequential-shared": {"heads": "sequential", "share_modules": True},
    "sequential-own-norm": {"heads": "sequential", "own_output_norm": True},
    "sequential-fused-shared": {"heads": "sequential", "fuse_layers": True, "share_modules": True},
    "sequential-tap": {"heads": "sequential", "tap_back": 1},
    "hydra-tap": {"heads": "hydra", "tap_back": 2},
    "medusa-tap": {"heads": "medusa", "tap_back": 1},
    "replicated-tap": {"heads": "replicated_unembedding", "tap_back": 1},
}
"""Name -> fields of `MultiTokenConfig`."""

CHANGES_BASE = {"anticausal", "anticausal-markov"}
IN_TURN = {name for name, options in ARCHITECTURES.items() if options.get("heads") in ("hydra", "sequential")}
MARKOV = {name for name, options in ARCHITECTURES.items() if options.get("markov_rank")}
WITH_CACHE = {
    name
    for name, options in ARCHITECTURES.items()
    if options.get("heads", "transformer") in ("transformer", "sequential")
}


def head_model(
    architecture: str,
    family: str = "llama",
    *,
    num_future_tokens: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    perturb: float = 0.2,
    **options: Any,
) -> MultiTokenLM:
    """A random model of the architecture, in eval mode; weights that start at zero or one are moved away from it."""
    model = tiny_model(
        family, num_future_tokens=num_future_tokens, dtype=dtype, seed=seed, **(ARCHITECTURES[architecture] | options)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(perturb * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


class PlainLayers:
    """Runs decoder layers of a base on given hidden states, through the family's own forward and nothing of ours."""

    def __init__(self, base: Any) -> None:
        self._decoder = copy.deepcopy(base.base_model)
        for module in self._decoder.modules():
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
        config = self._decoder.config = copy.deepcopy(base.config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-1:]
        self._name = "h" if hasattr(self._decoder, "h") else "layers"
        for norm in ("norm", "ln_f", "final_layer_norm"):
            if hasattr(self._decoder, norm):
                setattr(self._decoder, norm, nn.Identity())
        if hasattr(self._decoder, "wpe"):
            nn.init.zeros_(self._decoder.wpe.weight)

    def __call__(self, layer: nn.Module, hidden_BTD: Tensor) -> Tensor:
        layers = nn.ModuleList()
        layers.append(layer)
        setattr(self._decoder, self._name, layers)
        hidden: Tensor = self._decoder(inputs_embeds=hidden_BTD, use_cache=False)[0]
        return hidden
