"""Compiled layers in the training step, and only there.

Only the forward of decoder layers is compiled: they are most of the work, all of one class share one compiled function,
and everything around them (packing masks, the loss) stays ordinary. Evaluation, decoding and saving use the eager
forward: every new shape would be compiled anew, for seconds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

_COMPILERS = ("c++", "g++", "clang++") if sys.platform != "win32" else ("cl",)


def has_cpp_compiler() -> bool:
    """Whether the C++ compiler that compiled CPU code needs is on the path."""
    return any(shutil.which(name) for name in _COMPILERS)


class LayerCompiler:
    """Switches layers between their eager forward and a compiled one.

    The module tree, parameters and state dict are untouched: a compiled forward is an attribute of the layer while the
    block runs.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        """Prepare layers; nothing is compiled before the first call inside `active`.

        Args:
            layers: decoder layers of the base and heads.
        """
        self._layers = layers
        functions: dict[type[nn.Module], Callable[..., Any]] = {}
        for layer in layers:
            kind = type(layer)
            if kind not in functions:
                # One shape per variant (with and without a mask), so static shapes: dynamic ones are slower.
                functions[kind] = torch.compile(kind.forward, dynamic=False)
        self._functions = functions

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers compiled inside the block."""
        for layer in self._layers:
            layer.forward = MethodType(self._functions[type(layer)], layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward
