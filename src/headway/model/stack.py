"""The plain model inside a model whose heads changed its base, in one stack.

Legend: L layers of the base.

With anticausal wiring the next-token path is trunk -> heads n..2 -> last layer. That is a plain causal LM with more
layers, and the only export that predicts the next token as the multi-token model does.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headway.errors import ConfigError
from headway.heads.transformer import AnticausalTransformerHeads


def stack_config(base_config: Any, *, num_inserted: int) -> Any:
    """The configuration of a base with layers of its last layer's kind put before the last one."""
    config = copy.deepcopy(base_config)
    layers = int(config.num_hidden_layers)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == layers:
            setattr(config, name, value + value[-1:] * num_inserted)
    config.num_hidden_layers = layers + num_inserted
    return config


def plain_stack(model: Any) -> Any:
    """A Hugging Face causal LM whose logits are the multi-token model's at offset 1, its weights copies.

    Args:
        model: a `MultiTokenLM` whose heads changed its base.

    Raises:
        ConfigError: another model, whose base is the plain model already.
    """
    heads = model.heads
    if not isinstance(heads, AnticausalTransformerHeads):
        raise ConfigError(
            f"only heads that are part of the next-token path make another plain model: got {model.mtp_config}; its "
            f"plain model is model.base"
        )
    inserted = [layer for layers in reversed(heads.layers_of_heads) for layer in layers]
    config = stack_config(model.base.config, num_inserted=len(inserted))
    weight = model.family.lm_head.weight
    with torch.random.fork_rng(devices=[]):
        plain = AutoModelForCausalLM.from_config(config, dtype=weight.dtype)
    plain.load_state_dict(_stacked_state(model, inserted), strict=True)
    plain.generation_config = copy.deepcopy(model.base.generation_config)
    return plain.to(weight.device).train(model.training)


def _stacked_state(model: Any, inserted: list[Any]) -> dict[str, Tensor]:
    layers = model.family.layers
    prefix = next(name for name, module in model.base.named_modules() if module is layers)
    last = f"{prefix}.{len(layers) - 1}."
    state = dict(model.base.state_dict())
    for name in [name for name in state if name.startswith(last)]:
        state[f"{prefix}.{len(layers) - 1 + len(inserted)}.{name.removeprefix(last)}"] = state.pop(name)
    for index, layer in enumerate(inserted, start=len(layers) - 1):
        state |= {f"{prefix}.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    return state
