"""The products of few rows by our C++ kernel (`headway.decoding.lean.native`).

Legend: R rows of the input, D inputs, O outputs.

The kernel reads each weight once and in order, where it lies: no copy in another layout. A row's result does not depend on
what stands beside it, bit for bit. Beyond `MOST_ROWS` rows, and where there is no compiler, other products are used
(`headway.decoding.lean.linear`).
"""

from __future__ import annotations

import ctypes

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
    """Products with one matrix: (x [R, D], output [R, O] with any row stride) -> None."""

    def __init__(self, weight: Tensor | IntegerWeight, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        """Point at a matrix.

        Args:
            weight: contiguous [O, D].
            bias_O: or None.
            dtype: of input and output, for which there is a kernel.
        """
        found = library()
        assert found is not None
        self._kept = weight, bias_O
        self._matrix = MatrixFields.of(weight, bias_O)
        self._address = ctypes.addressof(self._matrix)
        self._function = found.headway_linear_float32 if dtype == torch.float32 else found.headway_linear_bfloat16

    def __call__(self, x_RD: Tensor, out_RO: Tensor) -> None:
        """Write the product."""
        rows, inputs = x_RD.shape
        self._function(
            x_RD.data_ptr(), rows, inputs, self._address, out_RO.data_ptr(), out_RO.stride(0), torch.get_num_threads()
        )


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
