"""Transformer heads: decoder layers of the base's own family, one stack per offset, in three wirings.

Legend: B batch, T positions, D width, L layers of the base, H_k the layers of head k, H_1 the base's last layer.

    parallel     h_k = H_k(z)                                      offset 1: h_1 = H_1(z)
    causal       h_k = H_k(h_{k-1})                                offset 1: h_1 = H_1(z)
    anticausal   h_n = H_n(z),  h_k = H_k(h_{k+1})                 offset 1: h_1 = H_1(h_2), last of all

Each h_k goes through the shared final norm and unembedding. With `tap_back=j` parallel heads read the input of layer
L - j instead of z, the input of layer L.

Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2 (parallel) and appendix B (causal, anticausal).
"""

from __future__ import annotations

from torch import Tensor, nn

from headway.heads.base import ChainedHeads, HeadInputs, Heads, LayerCall, ParallelHeads, Reading, SplicedHeads
from headway.heads.options import HeadOptions
from headway.heads.parts import BaseParts


class TransformerHeads(Heads):
    """Bodies of decoder layers, whatever they read."""

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        count = options.layers_per_head
        bodies: list[nn.Module] = []
        for index in range(num_heads):
            layers = [parts.decoder_layer(parts.num_layers + index * count + place) for place in range(count)]
            bodies.append(layers[0] if count == 1 else nn.ModuleList(layers))
        super().__init__(bodies, num_heads=num_heads)
        self.layers_per_head = count
        self.reading = Reading("layer_input", options.tap_back)

    @property
    def layers_of_heads(self) -> list[list[nn.Module]]:
        """The layers of each head, offset 2 first, each in the order in which they run."""
        return [_layers(body) for body in self.bodies]

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """All layers of all heads."""
        return [layer for layers in self.layers_of_heads for layer in layers]

    def cache_layers(self, num_heads: int) -> int:
        """One per layer."""
        return num_heads * self.layers_per_head


class ParallelTransformerHeads(TransformerHeads, ParallelHeads):
    """Each head reads the trunk."""

    def head(self, inputs: HeadInputs, offset: int) -> Tensor:
        """See `ParallelHeads.head`."""
        return run_head(inputs.call, self.bodies[offset - 2], inputs.hidden_BTD)


class CausalTransformerHeads(TransformerHeads, ChainedHeads):
    """Each head reads the one before it, the first the base's last layer."""

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        super().__init__(parts, options, num_heads=num_heads)
        self.reading = Reading("final_residual")

    def link(self, inputs: HeadInputs, offset: int, before_BTD: Tensor) -> Tensor:
        """See `ChainedHeads.link`."""
        return run_head(inputs.call, self.bodies[offset - 2], before_BTD)


class AnticausalTransformerHeads(TransformerHeads, SplicedHeads):
    """Each head reads the one after it; they run inside the base, between its trunk and its last layer."""

    def cache_layers(self, num_heads: int) -> int:
        """Of all heads, however few offsets are drafted: the next token needs them."""
        return self.num_heads * self.layers_per_head

    def splice(self, call: LayerCall) -> tuple[Tensor, ...]:
        """See `SplicedHeads.splice`."""
        hidden_BTD, future = call.hidden_BTD, []
        for body in reversed(self.bodies):
            hidden_BTD = run_head(call, body, hidden_BTD)
            future.append(hidden_BTD)
        return tuple(reversed(future))


def run_head(call: LayerCall, body: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """The layers of one head, one after the other, called as the base's last layer was."""
    for layer in _layers(body):
        hidden_BTD = call.replay(layer, hidden_BTD)
    return hidden_BTD


def _layers(body: nn.Module) -> list[nn.Module]:
    return list(body) if isinstance(body, nn.ModuleList) else [body]
