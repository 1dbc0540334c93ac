"""Compiled layers in the training step, and only there.

Only the forward of decoder layers is compiled: they are most of the work, all of one class share one compiled function,
and everything around them (packing masks, the loss) stays ordinary. Evaluation, decoding and saving use the eager
forward: every new shape would be compiled anew, for seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from headway.data.loader import Batch
from headway.errors import TrainingError
from headway.training.precision import Precision, forward_precision
from headway.training.rng import preserved_rng

_COMPILERS = ("c++", "g++", "clang++") if sys.platform != "win32" else ("cl",)


def has_cpp_compiler() -> bool:
    """Whether the C++ compiler that compiled CPU code needs is named by CXX or on the path."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)


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


def compile_layers(
    mode: Literal["auto", "on", "off"],
    model: Any,
    layers: list[nn.Module],
    batch: Batch,
    *,
    precision: Precision,
    notice: Callable[[str], None],
) -> LayerCompiler | None:
    """Compile now, on the shapes of the run, so that no step of the loop waits for it.

    Both variants of a layer are run once, forward and backward: rows of one document (no mask) and rows of several (a
    mask). Gradients are dropped and random states restored: training is what it would have been.

    Args:
        mode: "off" gives None; "auto" gives None, with a notice, where compiling is impossible.
        model: a `MultiTokenLM` in train mode without gradients.
        layers: those of the model to compile.
        batch: a micro-batch of the run.
        precision: of the forward.
        notice: told in one sentence what was decided.

    Raises:
        TrainingError: mode is "on" and compiling is impossible.
    """
    if mode == "off":
        return None
    reason = None
    compiler = None
    if batch.input_ids_BT.device.type == "cpu" and not has_cpp_compiler():
        reason = "no C++ compiler is on the path"
    else:
        began = time.perf_counter()
        notice("compiling the layers (the first time on a machine can take a minute)")
        try:
            compiler = LayerCompiler(layers)
            _warm_up(model, compiler, batch, precision)
            notice(f"layers compiled in {time.perf_counter() - began:.0f} s")
            return compiler
        except Exception as error:
            # Whatever the toolchain of a machine lacks shows here, as an error of its own kind; the reason is told.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if mode == "on":
        raise TrainingError(
            f"compile=on, but compiling is impossible: {reason}; install a C++ compiler or pass --compile off"
        )
    notice(f"layers run uncompiled (slower): {reason}")
    return None


def _warm_up(model: Any, compiler: LayerCompiler, batch: Batch, precision: Precision) -> None:
    length = batch.input_ids_BT.shape[1]
    index_BT = torch.arange(length, device=batch.input_ids_BT.device).expand_as(batch.input_ids_BT)
    one_document = torch.zeros_like(index_BT)
    two_documents = (index_BT >= length // 2).long()
    try:
        with preserved_rng(), compiler.active():
            for document_ids_BT in (one_document, two_documents):
                with forward_precision(model, precision):
                    loss = model(
                        input_ids=batch.input_ids_BT,
                        labels=batch.input_ids_BT,
                        position_ids=index_BT - document_ids_BT * (length // 2),
                        document_ids=document_ids_BT,
                    ).loss
                loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
