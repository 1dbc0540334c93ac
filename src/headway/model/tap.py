"""A tap on the base: what its last layer was called with, and its hidden states where heads read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headway.heads.base import LayerCall, Reading

__all__ = ["BaseTap", "LayerCall"]

Splice = Callable[[LayerCall], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cut:
    """A place where a graph was cut.

    Attributes:
        source_BTD: what came there, with its graph.
        leaf_BTD: the same without, which everything after the place reads; its gradient is what they send back.
    """

    source_BTD: Tensor
    leaf_BTD: Tensor

    @classmethod
    def at(cls, source_BTD: Tensor) -> Cut:
        """A cut behind these hidden states."""
        return cls(source_BTD, source_BTD.detach().requires_grad_())

    def send_back(self) -> None:
        """Run the backward of what lies before the cut, with the gradient that has been collected behind it."""
        if self.source_BTD.requires_grad and self.leaf_BTD.grad is not None:
            self.source_BTD.backward(self.leaf_BTD.grad)  # type: ignore[no-untyped-call]


class BaseTap:
    """Records the next pass of the base while armed; costs an attribute test per hook otherwise.

    The hooks sit outside gradient checkpointing and outside a compiled `forward`, so what they see carries the graph.
    """

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, reading: Reading) -> None:
        """Hook the last layer and the places where heads read.

        Args:
            layers: the base's decoder layers.
            norm: its final norm.
            reading: where heads read.
        """
        self._armed = False
        self._cut = False
        self._splice: Splice | None = None
        self._call: LayerCall | None = None
        self._read: dict[int, Tensor] = {}
        self._cuts: dict[int, Cut] = {}
        self._spliced: tuple[Tensor, ...] = ()
        # A state from before the last layer is normed here; the base's own output has been.
        self._norm = norm if reading.point == "final_hidden" and reading.layers_back else None
        # In the order of their registration, so that the last layer's call is recorded as it is after a cut.
        self._handles = [
            module.register_forward_pre_hook(partial(self._note, place), with_kwargs=True)
            for place, module in enumerate(_places(layers, norm, reading))
        ]
        self._handles.append(layers[-1].register_forward_pre_hook(self._record, with_kwargs=True))

    def _note(
        self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The final norm serves the heads as well: only the base's own call, the first, is of interest.
        if not self._armed or place in self._read:
            return None
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        self._read[place] = hidden_BTD
        if not self._cut:
            return None
        # The per-head schedule: what follows sees a leaf, so that its backward stops there and gradients of all heads
        # collect in leaf.grad before the trunk's one backward.
        cut = Cut.at(hidden_BTD)
        self._cuts[place], self._read[place] = cut, cut.leaf_BTD
        if args:
            return (cut.leaf_BTD, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": cut.leaf_BTD}

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._armed:
            return None
        if args:
            call = LayerCall(args[0], tuple(args[1:]), kwargs)
        else:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            call = LayerCall(kwargs["hidden_states"], (), rest)
        self._call = call
        if self._splice is None:
            return None
        self._spliced = self._splice(call)
        return (self._spliced[0], *call.args), call.kwargs

    @contextmanager
    def armed(self, *, cut: bool = False, splice: Splice | None = None) -> Iterator[BaseTap]:
        """Record one pass inside the block.

        Args:
            cut: feed what follows a place of reading a detached leaf instead of what came there.
            splice: run this before the last layer, which then reads its first output.
        """
        self._armed, self._cut, self._splice = True, cut, splice
        self._call, self._read, self._cuts, self._spliced = None, {}, {}, ()
        try:
            yield self
        finally:
            self._armed, self._cut, self._splice = False, False, None
            self._call, self._read, self._cuts, self._spliced = None, {}, {}, ()

    @property
    def call(self) -> LayerCall:
        """How the last layer was called.

        Raises:
            RuntimeError: the layer did not run, a bug of the caller.
        """
        if self._call is None:
            raise RuntimeError("the last layer was not called while its tap was armed")
        return self._call

    def reading(self, final_hidden_BTD: Tensor) -> Tensor:
        """The hidden states where heads read, concatenated; `final_hidden_BTD` where that is the base's own output."""
        if not self._read:
            return final_hidden_BTD
        if self._norm is not None:
            normed_BTD: Tensor = self._norm(self._read[0])
            return normed_BTD
        states = [self._read[place] for place in sorted(self._read)]
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1)

    @property
    def cuts(self) -> list[Cut]:
        """Where the graph was cut, the place nearest to the output first."""
        return [self._cuts[place] for place in sorted(self._cuts, reverse=True)]

    @property
    def spliced(self) -> tuple[Tensor, ...]:
        """What `splice` gave."""
        return self._spliced

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _places(layers: nn.ModuleList, norm: nn.Module, reading: Reading) -> list[nn.Module]:
    """The modules whose inputs heads read, in the order in which they run."""
    back = reading.layers_back
    if reading.point == "layer_input":
        return [layers[-1 - back]]
    if reading.point == "layer_inputs":
        return [layers[index] for index in reading.layers]
    if reading.point == "final_residual":
        return [norm]
    return [layers[-back]] if back else []
