"""A tap on the last layer: what it was called with, so that head layers can be called the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


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


class LastLayerTap:
    """Records the next call of a layer while armed; costs one attribute test otherwise.

    The hook sits outside gradient checkpointing and outside a compiled `forward`, so what it sees carries the graph.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._armed = False
        self._cut = False
        self._call: LayerCall | None = None
        self._handle = layer.register_forward_pre_hook(self._record, with_kwargs=True)

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
        if not self._cut:
            return None
        # The per-head schedule: the last layer sees a leaf, so that its backward stops there and gradients of all heads
        # collect in leaf.grad before the trunk's one backward.
        leaf_BTD = call.hidden_BTD.detach().requires_grad_()
        self.leaf_BTD = leaf_BTD
        return (leaf_BTD, *call.args), call.kwargs

    @contextmanager
    def armed(self, *, cut: bool = False) -> Iterator[LastLayerTap]:
        """Record calls inside the block; with `cut`, feed the layer a detached leaf instead of the trunk's output."""
        self._armed, self._cut, self._call = True, cut, None
        try:
            yield self
        finally:
            self._armed, self._cut, self._call = False, False, None

    @property
    def call(self) -> LayerCall:
        """The recorded call.

        Raises:
            RuntimeError: the layer did not run, a bug of the caller.
        """
        if self._call is None:
            raise RuntimeError("the last layer was not called while its tap was armed")
        return self._call

    def remove(self) -> None:
        """Take the hook off the layer."""
        self._handle.remove()
