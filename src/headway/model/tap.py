"""A tap on the base: what its last layer was called with, and its hidden states where heads read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from headway.heads.base import LayerCall, Reading

__all__ = ["BaseTap", "LayerCall"]

Splice = Callable[[LayerCall], tuple[Tensor, ...]]


class BaseTap:
    """Records the next pass of the base while armed; costs an attribute test per hook otherwise.

    The hooks sit outside gradient checkpointing and outside a compiled `forward`, so what they see carries the graph.
    """

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, reading: Reading) -> None:
        """Hook the last layer and, where heads read elsewhere, that place.

        Args:
            layers: the base's decoder layers.
            norm: its final norm.
            reading: where heads read.
        """
        self._armed = False
        self._cut = False
        self._splice: Splice | None = None
        self._call: LayerCall | None = None
        self._read_BTD: Tensor | None = None
        self._spliced: tuple[Tensor, ...] = ()
        self._reads_here = reading.point == "layer_input" and reading.layers_back == 0
        handles = [layers[-1].register_forward_pre_hook(self._record, with_kwargs=True)]
        if reading.point == "layer_input" and reading.layers_back:
            handles.append(layers[-1 - reading.layers_back].register_forward_pre_hook(self._read, with_kwargs=True))
        elif reading.point == "final_residual":
            handles.append(norm.register_forward_pre_hook(self._read, with_kwargs=True))
        self._handles = handles

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The final norm serves the heads as well: only the base's own call, the first, is of interest.
        if self._armed and self._read_BTD is None:
            self._read_BTD = args[0] if args else kwargs["hidden_states"]

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
        if self._reads_here:
            self._read_BTD = call.hidden_BTD
        if self._splice is not None:
            self._spliced = self._splice(call)
            return (self._spliced[0], *call.args), call.kwargs
        if not self._cut:
            return None
        # The per-head schedule: the last layer sees a leaf, so that its backward stops there and gradients of all heads
        # collect in leaf.grad before the trunk's one backward.
        leaf_BTD = call.hidden_BTD.detach().requires_grad_()
        self.leaf_BTD = leaf_BTD
        return (leaf_BTD, *call.args), call.kwargs

    @contextmanager
    def armed(self, *, cut: bool = False, splice: Splice | None = None) -> Iterator[BaseTap]:
        """Record one pass inside the block.

        Args:
            cut: feed the last layer a detached leaf instead of the trunk's output.
            splice: run this before the last layer, which then reads its first output.
        """
        self._armed, self._cut, self._splice = True, cut, splice
        self._call, self._read_BTD, self._spliced = None, None, ()
        try:
            yield self
        finally:
            self._armed, self._cut, self._splice = False, False, None
            self._call, self._read_BTD, self._spliced = None, None, ()

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
        """The hidden states at the place that heads read; `final_hidden_BTD` where that is the base's own output."""
        return final_hidden_BTD if self._read_BTD is None else self._read_BTD

    @property
    def spliced(self) -> tuple[Tensor, ...]:
        """What `splice` gave."""
        return self._spliced

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
