"""Transformer heads: one decoder layer of the base's own family per offset.

Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2: each head is one transformer layer on the trunk's output, with
the final norm and the unembedding shared by all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def transformer_heads(
    last_layer: nn.Module,
    *,
    num_heads: int,
    first_layer_idx: int,
    initialize: Callable[[nn.Module], None] | None,
) -> nn.ModuleList:
    """Head layers of the last layer's class, each with its own place in a cache.

    Args:
        last_layer: the base's last decoder layer (head 1); neither shared nor changed.
        num_heads: n - 1.
        first_layer_idx: cache index of the first head, the base's number of layers L; head i has L + i.
        initialize: draws a module's weights as the family draws a new model's; None keeps copies of the last layer.

    Returns:
        `num_heads` layers; item i predicts offset i + 2.
    """
    heads = nn.ModuleList()
    for index in range(num_heads):
        head = copy.deepcopy(last_layer)
        # The copy must not carry a tap, or any other hook, of the layer that it was made from.
        for module in head.modules():
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
            module._forward_hooks.clear()
            module._forward_hooks_with_kwargs.clear()
            if hasattr(module, "layer_idx"):
                module.layer_idx = first_layer_idx + index  # type: ignore[assignment]
        if initialize is not None:
            for parameter in head.parameters():
                # Set by from_pretrained on loaded tensors; the family's initialiser skips tensors that have it.
                if hasattr(parameter, "_is_hf_initialized"):
                    del parameter._is_hf_initialized
            with torch.no_grad():
                for module in head.modules():
                    initialize(module)
        head.requires_grad_(True)
        heads.append(head)
    return heads
