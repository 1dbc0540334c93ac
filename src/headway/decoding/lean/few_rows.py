"""The products of few rows by our C++ kernel (`headway.decoding.lean.native`).

Legend: R rows of the input, D inputs, O outputs.

The kernel reads each weight once and in order, where it lies: no copy in another layout. A row's result does not depend on
what stands beside it, bit for bit. Beyond `MOST_ROWS` rows, and where there is no compiler, other products are used
(`headway.decoding.lean.linear`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from headway.decoding.lean.integers import IntegerWeight
from headway.decoding.lean.native import library

MOST_ROWS = 32


class MatrixFields(ctypes.Structure):
    """`Matrix` of kernel/products.hpp: addresses, so whoever makes one keeps the tensors."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, weight: Tensor | IntegerWeight, bias_O: Tensor | None) -> MatrixFields:
        """The fields of a matrix [O, D] and its bias."""
        bias = None if bias_O is None else bias_O.data_ptr()
        if isinstance(weight, IntegerWeight):
            addresses = weight.scales_O.data_ptr(), weight.sums_O.data_ptr()
            return cls(weight.values_OP.data_ptr(), bias, weight.values_OP.shape[0], *addresses)
        return cls(weight.data_ptr(), bias, weight.shape[0], None, None)


class FewRows:
    """Products with matrices of one shape: (x [R, D], output) -> None, in one call."""

    def __init__(self, weights: Sequence[tuple[Tensor | IntegerWeight, Tensor | None]], dtype: torch.dtype) -> None:
        """Point at matrices.

        Args:
            weights: contiguous [O, D] and a bias [O] or none, for each.
            dtype: of input and output, for which there is a kernel.
        """
        found = library()
        assert found is not None
        self._kept = tuple(weights)
        self._matrices = (MatrixFields * len(weights))(*(MatrixFields.of(weight, bias_O) for weight, bias_O in weights))
        self._address = ctypes.addressof(self._matrices)
        self._function = found.headway_linear_float32 if dtype == torch.float32 else found.headway_linear_bfloat16

    def __call__(self, x_RD: Tensor, out: Tensor) -> None:
        """Write the product with the first matrix into [R, O] with any row stride, or those with the first K into [K, R, O]."""
        rows, inputs = x_RD.shape
        count, step = (out.shape[0], out.stride(0)) if out.dim() == 3 else (1, 0)
        threads = torch.get_num_threads()
        row_stride = out.stride(-2)
        self._function(x_RD.data_ptr(), rows, inputs, self._address, count, out.data_ptr(), row_stride, step, threads)


def kernel_for(weight: Tensor) -> type[FewRows] | None:
    """The products with such a matrix; None where there are none (no compiler, another device or dtype)."""
    known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return FewRows if known and library() is not None else None


def read_once(numbers: Tensor, *, threads: int) -> bool:
    """Read float32 numbers once, as fast as memory gives them: the limit of a step. False where there is no kernel."""
    found = library()
    if found is None:
        return False
    found.headway_read(numbers.data_ptr(), numbers.numel(), threads)
    return True
