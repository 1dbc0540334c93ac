"""What heads may take from the base: copies of its modules, or modules drawn as its family draws them.

Legend: D width, V vocabulary, L layers of the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class BaseParts:
    """What heads may copy from the base, and how they draw what they do not copy.

    Attributes:
        last_layer: its last decoder layer (head 1).
        norm: its final norm.
        unembedding: its output matrix.
        num_layers: L; head caches live at indices L, L + 1, ...
        initialize: draws a module's weights as the family draws a new model's.
        fresh: draw everything; else heads start from the base's own weights where the architecture allows it.
    """

    last_layer: nn.Module
    norm: nn.Module
    unembedding: nn.Linear
    num_layers: int
    initialize: Callable[[nn.Module], None]
    fresh: bool

    @property
    def width(self) -> int:
        """D."""
        return int(self.unembedding.weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.unembedding.weight.shape[0])

    def linear(self, inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
        """A linear map, drawn as the family draws one, where and in what precision the base's unembedding is."""
        weight = self.unembedding.weight
        layer = nn.Linear(inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype)
        draw(layer, self.initialize)
        return layer

    def new_unembeddings(self, count: int) -> list[nn.Linear]:
        """Output matrices [V, D], copies of the base's, or drawn where heads are."""
        layers = [self.linear(self.width, self.vocabulary) for _ in range(count)]
        if not self.fresh:
            with torch.no_grad():
                for layer in layers:
                    layer.weight.copy_(self.unembedding.weight)
        return layers

    def new_norm(self) -> nn.Module:
        """A norm of the final norm's kind, with the weights of a new one."""
        norm = copy.deepcopy(self.norm)
        without_hooks(norm)
        draw(norm, self.initialize)
        return norm

    def decoder_layer(self, cache_index: int) -> nn.Module:
        """A layer of the last layer's class with its own place in a cache: a copy, or drawn where heads are."""
        layer = copy.deepcopy(self.last_layer)
        without_hooks(layer)
        place_in_cache(layer, cache_index)
        if self.fresh:
            draw(layer, self.initialize)
        layer.requires_grad_(True)
        return layer


def place_in_cache(layer: nn.Module, index: int) -> None:
    """Let a decoder layer keep its keys and values in layer `index` of a cache."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]


def without_hooks(copied: nn.Module) -> None:
    """Take off what a deep copy took along: taps and other hooks of the module that it was made from."""
    for module in copied.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()


def draw(drawn: nn.Module, initialize: Callable[[nn.Module], None]) -> None:
    """Give a module new weights, and make them trainable."""
    for parameter in drawn.parameters():
        # Set by from_pretrained on loaded tensors; the family's initialiser skips tensors that have it.
        if hasattr(parameter, "_is_hf_initialized"):
            del parameter._is_hf_initialized
    with torch.no_grad():
        for module in drawn.modules():
            initialize(module)
    drawn.requires_grad_(True)
