"""Which modules of a multi-token model LoRA adapts and which PEFT trains and saves whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from torch import nn
from transformers.pytorch_utils import Conv1D

from headway.errors import IncompatibleModelError
from headway.model.multi_token_lm import MultiTokenLM


class LoraModuleNames(TypedDict):
    """Arguments for `peft.LoraConfig`.

    Attributes:
        target_modules: full names of the base's linear layers, unembedding left out.
        modules_to_save: everything that is not the base: a name for every head.
    """

    target_modules: list[str]
    modules_to_save: list[str]


def lora_module_names(model: MultiTokenLM) -> LoraModuleNames:
    """The spelling that PEFT needs for LoRA on the base with whole heads.

    `LoraConfig(r=8, task_type="CAUSAL_LM", **lora_module_names(model))`. Full names, because a bare "q_proj" would name
    the heads' layers too; one name per head, because PEFT cannot save a list of modules ("heads").

    Args:
        model: the multi-token model, not yet wrapped.

    Returns:
        Names of every linear map inside the base's decoder layers, and of every head.

    Raises:
        IncompatibleModelError: a parameter outside the base that belongs to no module PEFT can save.
    """
    layers = {id(module) for layer in model.family.layers for module in layer.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if id(module) in layers and isinstance(module, nn.Linear | Conv1D)
    ]
    whole = [name for child, module in model.heads.named_children() for name in _savable(f"heads.{child}", module)]
    for name, _ in model.named_parameters():
        if not name.startswith(("base.", *(f"{part}." for part in whole))):
            raise IncompatibleModelError(
                f"PEFT saves modules, and {name} belongs to none of its own: these heads cannot be trained beside LoRA; train "
                f"them without PEFT, or choose another architecture"
            )
    return {"target_modules": linear, "modules_to_save": whole}


def _savable(name: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child, part in module.named_children():
            yield from _savable(f"{name}.{child}", part)
    elif any(True for _ in module.parameters()):
        yield name
