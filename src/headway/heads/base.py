"""What every head architecture is: where it reads, what it needs, and how it drafts.

Legend: B batch, T positions, W positions of one pass, X nodes of one depth of a draft, D width, V vocabulary, N future
tokens, L layers of the base.

Everybody outside this room (model, losses, decoding) knows heads through `Heads` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from headway.heads.auxiliary import RegisterTokens, TokenOrderHead
from headway.heads.call_arguments import at_columns, by_name, select
from headway.heads.markov import MarkovBias


@dataclass(frozen=True)
class Reading:
    """A place in the base, or several.

    Attributes:
        point: "layer_input": what a decoder layer gets; "final_residual": what the last layer gives; "final_hidden": the
            same after the final norm; "layer_inputs": what several layers get, concatenated.
        layers_back: for "layer_input": 0 is the last layer (its input is the trunk's output z), k is layer L - k. For
            "final_hidden": k > 0 is what layer L - k gives, after the final norm.
        layers: for "layer_inputs": the layers, counted from 0.
    """

    point: Literal["layer_input", "final_residual", "final_hidden", "layer_inputs"]
    layers_back: int = 0
    layers: tuple[int, ...] = ()


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
        args, kwargs = self.args, self.kwargs
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if getattr(cache, "hidden", None):
            # The decoding engine's cache, with slots that hold nothing for this layer though they do for the base.
            index = next(module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx"))
            args = tuple(cast(Any, cache).hide(index, value) for value in args)
            kwargs = {name: cast(Any, cache).hide(index, value) for name, value in kwargs.items()}
        output = layer(self.hidden_BTD if hidden_BTD is None else hidden_BTD, *args, **kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def moved(self, layer: nn.Module, columns_BX: Tensor, mask_B1XS: Tensor) -> LayerCall:
        """The same call of a layer at other positions of its rows, where each sees what a mask says.

        Args:
            layer: of the family.
            columns_BX: which position of this call stands at each of the X new ones.
            mask_B1XS: additive, over the slots that the cache shows when the layer runs.

        Raises:
            ConfigError: a family whose layers get per-position arguments that are not known here.
        """
        arguments = by_name(layer, self.args, self.kwargs)
        kwargs = at_columns(arguments, columns_BX, mask_B1XS, instead="draft a chain: leave tree out")
        return replace(self, hidden_BTD=select(self.hidden_BTD, columns_BX), args=(), kwargs=kwargs)

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
        hidden_BTD: at the place that the heads declared (`Heads.reading`); as many times D wide as they declared places.
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
class DraftPlaces(ABC):
    """Where a draft that branches keeps keys and values: known positions at their own slots, drafted tokens behind them.

    At depth k of the heads the entry of position p is that of the token k places later. A draft's root, the token that the
    base has just chosen, therefore has its entry k - 1 positions before each row's last known one, and a drafted token
    `levels` below the root so many positions after that.

    Attributes:
        columns_BW: columns of the pass that hold each row's known positions in order, fillers after its last.
        last_B: which of them is each row's last that stands.
    """

    columns_BW: Tensor
    last_B: Tensor

    @abstractmethod
    def call(
        self,
        call: LayerCall,
        layer: nn.Module,
        *,
        depth: int,
        known: int,
        levels: Sequence[int],
        ancestors_BNN: Tensor,
    ) -> LayerCall:
        """The next call of a layer; its keys and values are stored.

        Args:
            call: of the pass.
            layer: of the family.
            depth: of the heads, from 1.
            known: how many of the W known positions come first.
            levels: of the N drafted tokens that follow; the root has 0.
            ancestors_BNN: whether the token of the column is that of the row or above it.
        """


@dataclass(frozen=True)
class DraftPoint:
    """Where a draft starts: one pass of the base, and a place in it for each row.

    Attributes:
        inputs: of the pass.
        future_hidden: what the heads gave in that pass; empty where they wait for drafted tokens.
        tokens_BW: what the pass was fed, in which everything up to the place stands.
        columns_B: each row's last token that stands; the draft begins two tokens later, after the token that the base
            has just chosen.
        places: of a draft that branches, for heads that keep keys and values of drafted tokens: these alone say then where
            the draft starts; None for a chain.
    """

    inputs: HeadInputs
    future_hidden: tuple[Tensor, ...]
    tokens_BW: Tensor
    columns_B: Tensor
    places: DraftPlaces | None = None

    def at(self, hidden_BWD: Tensor) -> Tensor:
        """Each row's hidden state [B, D] at its place."""
        return hidden_BWD[torch.arange(hidden_BWD.shape[0], device=hidden_BWD.device), self.columns_B]


Choose = Callable[[Tensor, int], Tensor]
"""(hidden states of an offset [B, T, D], offset) -> the likeliest tokens [B, T], without a gradient."""

DraftStep = Callable[[int, Tensor, Tensor | None], Tensor]
"""(offset, tokens drafted for offset - 1 [B, X], their parents [B, X]) -> hidden states of that offset [B, X, D].

Called with offsets 2, 3, ... in turn; X is how many nodes of that depth of a candidate tree go on, and parents are places
among the nodes of the call before, None where every call has one node (a chain). [B, 1, D] where the state is the same for
all nodes. With offset 2 comes the token that the base has just chosen, the only one of its depth."""


class Heads(nn.Module, ABC):
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
        auxiliary: what an auxiliary objective trains, saved with the heads; None where there is none.
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
        self.auxiliary: TokenOrderHead | RegisterTokens | None = None

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
        """Maps onto the vocabulary that the heads own: unembeddings, the bias of the previous token, the scores of an order."""
        own = [] if self.unembeddings is None else [cast(nn.Linear, module) for module in self.unembeddings]
        if self.markov is not None:
            own.append(self.markov.to_logits)
        if isinstance(self.auxiliary, TokenOrderHead):
            own.append(self.auxiliary.to_scores)
        return own

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

    @abstractmethod
    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """Hidden states [B, T, D] of offsets 2..num_heads + 1, with the tokens in between taken from the text."""

    def begin_draft(self, point: DraftPoint) -> DraftStep:
        """Start a draft; the function that is returned gives offset after offset."""
        return lambda offset, tokens_BX, parents_BX: point.at(point.future_hidden[offset - 2])[:, None]


class ParallelHeads(Heads):
    """Heads that read the base and not each other."""

    @abstractmethod
    def head(self, inputs: HeadInputs, offset: int) -> Tensor:
        """Hidden states [B, T, D] of one offset."""

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`."""
        return tuple(self.head(inputs, offset) for offset in range(2, num_heads + 2))


class ChainedHeads(Heads):
    """Heads of which each reads the one before it."""

    def start(self, inputs: HeadInputs) -> Tensor:
        """What the first of them reads [B, T, D]."""
        return inputs.hidden_BTD

    @abstractmethod
    def link(self, inputs: HeadInputs, offset: int, before_BTD: Tensor) -> Tensor:
        """Hidden states [B, T, D] of one offset from those of the offset before it."""

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`."""
        hidden_BTD, future = self.start(inputs), []
        for offset in range(2, num_heads + 2):
            hidden_BTD = self.link(inputs, offset, hidden_BTD)
            future.append(hidden_BTD)
        return tuple(future)


class TokenReadingHeads(Heads):
    """Heads that read the tokens between a position and its offset."""

    reads_tokens = True

    @abstractmethod
    def drafted_hidden(self, inputs: HeadInputs, *, num_heads: int, choose: Choose) -> tuple[Tensor, ...]:
        """As `future_hidden`, but each position reads its own drafts instead of the text's tokens.

        The states are those that decoding would have computed, had a draft started at that position: the token after it
        is the text's, the later ones are the heads' likeliest (training-time test).
        """


class SplicedHeads(Heads):
    """Heads that run inside the base, before its last layer."""

    changes_base = True

    @abstractmethod
    def splice(self, call: LayerCall) -> tuple[Tensor, ...]:
        """Hidden states of offsets 2, 3, ... from the last layer's call; the last layer then reads item 0."""

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`; they have run already."""
        return inputs.spliced[:num_heads]
