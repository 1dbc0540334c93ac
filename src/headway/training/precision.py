"""In which type a training forward computes; weights, gradients and optimizer stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "bfloat16-residual"]


@contextmanager
def forward_precision(model: Any, precision: Precision) -> Iterator[None]:
    """Run a forward of `model` inside the block in this precision.

    float32 is as it is. bfloat16 is torch's autocast: matrix products in bfloat16, norms and the residual stream in
    float32. bfloat16-residual also rounds the embeddings to bfloat16, and with them the residual stream: less memory
    traffic, 4 to 5 % more tokens per second for narrow models on a CPU.
    """
    if precision == "float32":
        yield
        return
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(_round) if precision == "bfloat16-residual" else None
    try:
        with torch.autocast(embedding.weight.device.type, dtype=torch.bfloat16):
            yield
    finally:
        if hook is not None:
            hook.remove()


def _round(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(torch.bfloat16)
