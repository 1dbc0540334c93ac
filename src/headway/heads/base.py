"""What every head architecture is: where it reads, what it needs, and how it drafts.

Legend: B batch, T positions, W positions of one pass, D width, V vocabulary, N future tokens, L layers of the base.

Everybody outside this room (model, losses, decoding) knows heads through `Heads` alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from headway.heads.markov import MarkovBias


@dataclass(frozen=True)
class Reading:
    """A place in the base.

    Attributes:
        point: "layer_input": what a decoder layer gets; "final_residual": what the last layer gives; "final_hidden": the
            same after the final norm.
        layers_back: for "layer_input": 0 is the last layer (its input is the trunk's output z), k is layer L - k.
    """

    point: Literal["layer_input", "final_residual", "final_hidden"]
    layers_back: int = 0


TRUNK_OUTPUT = Reading("layer_input")


@dataclass(frozen=True)
class LayerCall:
    """One call of a decoder layer, split into its hidden states and everything else.

    Attributes:
        hidden_BTD: the layer's input, the trunk's output z.
        args: further positional arguments, as the family's own forward built them.
        kwargs: keyword arguments: mask, rotary embeddings, position ids, cache.
    """

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, layer: nn.Module, hidden_BTD: Tensor | None = None) -> Tensor:
        """Call another layer of the same family on the same input (or on `hidden_BTD`), with the same arguments."""
        output = layer(self.hidden_BTD if hidden_BTD is None else hidden_BTD, *self.args, **self.kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def without_cache(self) -> LayerCall:
        """The same call, storing no keys and values."""
        return replace(
            self,
            args=tuple(None if isinstance(value, Cache) else value for value in self.args),
            kwargs={name: None if isinstance(value, Cache) else value for name, value in self.kwargs.items()},
        )


@dataclass(frozen=True)
class HeadInputs:
    """What one pass of the base offers to its heads.

    Attributes:
        hidden_BTD: at the place that the heads declared (`Heads.reading`).
        call: how the last layer was called.
        embed: the base's token embedding, ids -> [..., D].
        following: offset -> the token that stands so many places later [B, T], -100 where there is none in the same
            document; None where the pass was given no tokens.
        spliced: outputs of heads that ran inside the base, in the order of their offsets from 2 on.
    """

    hidden_BTD: Tensor
    call: LayerCall
    embed: Callable[[Tensor], Tensor]
    following: Callable[[int], Tensor] | None = None
    spliced: tuple[Tensor, ...] = ()

    def embedded(self, ahead: int) -> Tensor:
        """Embeddings [B, T, D] of the tokens `ahead` places later; of token 0 where there is none (nobody reads them)."""
        assert self.following is not None
        return self.embed(self.following(ahead).clamp(min=0))


@dataclass(frozen=True)
class DraftPoint:
    """Where a draft starts: one pass of the base, and a place in it for each row.

    Attributes:
        inputs: of the pass.
        future_hidden: what the heads gave in that pass; empty where they wait for drafted tokens.
        tokens_BW: what the pass was fed, in which everything up to the place stands.
        columns_B: each row's last token that stands; the draft begins two tokens later, after the token that the base
            has just chosen.
    """

    inputs: HeadInputs
    future_hidden: tuple[Tensor, ...]
    tokens_BW: Tensor
    columns_B: Tensor

    def at(self, hidden_BWD: Tensor) -> Tensor:
        """Each row's hidden state [B, D] at its place."""
        return hidden_BWD[torch.arange(hidden_BWD.shape[0], device=hidden_BWD.device), self.columns_B]


DraftStep = Callable[[int, Tensor], Tensor]
"""(offset, token drafted for offset - 1 [B]) -> hidden state of that offset [B, D]; called with offsets 2, 3, ... in turn."""


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


class Heads(nn.Module):
    """Heads for offsets 2..n. Iterating gives their bodies; a subclass is one architecture.

    Attributes:
        uses_final_norm: whether the base's final norm goes between `future_hidden` and the unembedding.
        reads_tokens: whether bodies read the tokens between a position and its offset: known in training, drafted one
            after the other in decoding.
        changes_base: whether the bodies are part of the next-token path.
        reading: where the bodies read.
        num_heads: n - 1.
        unembeddings: the offsets' own output matrices, from offset 2 on; None where they share the base's.
        markov: bias on the logits from the previous token; None where there is none.
    """

    uses_final_norm: bool = True
    reads_tokens: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    reading: Reading = TRUNK_OUTPUT

    def __init__(
        self,
        bodies: Iterable[nn.Module],
        *,
        num_heads: int,
        unembeddings: Iterable[nn.Linear] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        for index, body in enumerate(bodies):
            self.add_module(str(index), body)
        # Apart from the bodies: the loss multiplies by these matrices outside the bodies' forward, so whoever shards
        # bodies one by one must leave them to the whole model.
        self.unembeddings = None if unembeddings is None else nn.ModuleList(unembeddings)
        self.markov: MarkovBias | None = None

    # -------------------------------------------------------------------------------------------- what they are

    @property
    def bodies(self) -> list[nn.Module]:
        """The modules that make hidden states, in the order of their numbers."""
        return [module for name, module in self._modules.items() if name.isdigit() and module is not None]

    def __iter__(self) -> Iterator[nn.Module]:
        """The bodies."""
        return iter(self.bodies)

    def __len__(self) -> int:
        """How many bodies there are: n - 1, but 1 where one is applied again and again, 0 where there is none."""
        return len(self.bodies)

    def __getitem__(self, index: int) -> nn.Module:
        """A body."""
        return self.bodies[index]

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """Decoder layers of the base's family among the bodies."""
        return []

    @property
    def vocabulary_matrices(self) -> list[nn.Linear]:
        """Maps onto the vocabulary that the heads own: unembeddings, and the bias of the previous token."""
        own = [] if self.unembeddings is None else [cast(nn.Linear, module) for module in self.unembeddings]
        return own if self.markov is None else [*own, self.markov.to_logits]

    @property
    def autoregressive(self) -> bool:
        """Whether an offset's draft needs the tokens drafted before it, so that offsets are drafted in turn."""
        return self.reads_tokens or self.markov is not None

    def cache_layers(self, num_heads: int) -> int:
        """Cache layers that the first `num_heads` offsets after the next token need, at indices L, L + 1, ...

        They look back as far as the base's last layer.
        """
        return 0

    def lookback(self, num_heads: int) -> int:
        """Known positions before the last known token that a pass must repeat when so many offsets are drafted."""
        return 0

    def unembedding(self, offset: int) -> nn.Linear | None:
        """An offset's own output matrix; None where it is the base's."""
        if self.unembeddings is None or offset == 1:
            return None
        return cast(nn.Linear, self.unembeddings[offset - 2])

    # -------------------------------------------------------------------------------------------- what they do

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """Hidden states [B, T, D] of offsets 2..num_heads + 1, with the tokens in between taken from the text."""
        raise NotImplementedError

    def splice(self, call: LayerCall) -> tuple[Tensor, ...]:
        """Run inside the base, before its last layer, which then reads item 0; items are offsets 2, 3, ..."""
        raise NotImplementedError

    def begin_draft(self, point: DraftPoint) -> DraftStep:
        """Start a draft; the function that is returned gives offset after offset."""
        return lambda offset, previous_B: point.at(point.future_hidden[offset - 2])
