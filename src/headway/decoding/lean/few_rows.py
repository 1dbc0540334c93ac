"""The products of few rows by our C++ kernel (`headway.decoding.lean.native`).

Legend: R rows of the input, D inputs, O outputs.

The kernel reads each weight once and in order, where it lies: no copy in another layout. A row's result does not depend on
what stands beside it, bit for bit. Beyond `MOST_ROWS` rows, and where there is no compiler, other products are used
(`headway.decoding.lean.linear`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headway.decoding.lean.native import library

MOST_ROWS = 32

Kernel = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""(x [R, D], weight [O, D], bias [O] or None, output [R, O] with any row stride) -> None."""


def kernel_for(weight: Tensor) -> Kernel | None:
    """The kernel for products with such a matrix; None where there is none (no compiler, another device or dtype)."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    found = library()
    if found is None:
        return None
    function = found.headway_linear_float32 if weight.dtype == torch.float32 else found.headway_linear_bfloat16

    def run(x_RD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, out_RO: Tensor) -> None:
        function(
            x_RD.data_ptr(),
            x_RD.shape[0],
            x_RD.shape[1],
            weight_OD.data_ptr(),
            weight_OD.shape[0],
            None if bias_O is None else bias_O.data_ptr(),
            out_RO.data_ptr(),
            out_RO.stride(0),
            torch.get_num_threads(),
        )

    return run


def read_once(numbers: Tensor, *, threads: int) -> bool:
    """Read float32 numbers once, as fast as memory gives them: the limit of a step. False where there is no kernel."""
    found = library()
    if found is None:
        return False
    found.headway_read(numbers.data_ptr(), numbers.numel(), threads)
    return True
