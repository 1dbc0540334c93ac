"""Linear maps for decoding, each product in the way that reads fastest.

Legend: R rows of the input, D inputs, O outputs.

A step of decoding multiplies few rows by all weights of a model, so its time is the time of reading them. On a CPU the plain
float32 product loses half of the memory's bandwidth from four rows on and the plain bfloat16 one loses it always
(`docs/decisions/0012-lean-executor.md` has the figures). Ways:

- "kernel": up to 16 rows by our C++ kernel on the weights as they lie (`few_rows`), more by the plain product;
- "packed": oneDNN's packed layout, a second copy of the weights; float32 up to three rows by the plain product;
- "plain": the plain product on the matrices, put together where there are several;
- "int8": by the kernel on weights rounded to int8 (`integers`): another model, which nobody gets who does not ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.decoding.lean.few_rows import MOST_ROWS, FewRows, kernel_for
from headway.decoding.lean.integers import IntegerWeight, Quantizer

Way = Literal["kernel", "packed", "plain", "int8"]

_PACKING_ROWS = 16
"""oneDNN chooses the layout for so many rows; results of 2 to 16 rows are then equal bit for bit up to K of about 1024."""

_FEW_ROWS = 3
"""Up to so many rows the plain float32 product is as fast as memory allows."""


class FusedLinear:
    """y = [x W_1^T + b_1, x W_2^T + b_2, ...], without gradients.

    Attributes:
        way: how products are made.
        num_bytes: of the copies of weights made here.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, way: Way, quantizer: Quantizer | None = None) -> None:
        """Fuse maps of the same input.

        Args:
            linears: in the order of their outputs.
            way: see `fastest_way`.
            quantizer: for "int8", to round each map once; None for a new one.

        Raises:
            ValueError: a way that does not exist for these matrices.
        """
        self.way = way
        self._parts = [(linear.weight.detach(), _detached(linear.bias)) for linear in linears]
        first_OD = self._parts[0][0]
        if (way in ("kernel", "int8") and kernel_for(first_OD) is None) or (way == "packed" and not can_pack(first_OD)):
            raise ValueError(f"no {way!r} products of {first_OD.dtype} on {first_OD.device}")
        self._outputs = sum(weight_OD.shape[0] for weight_OD, _ in self._parts)
        self._weight: Tensor | None = None
        self._bias_O = self._parts[0][1]
        self.num_bytes = 0
        if way == "kernel":
            self._parts = [(weight_OD.contiguous(), bias_O) for weight_OD, bias_O in self._parts]
            self._few = [FewRows([(weight_OD, bias_O)], first_OD.dtype) for weight_OD, bias_O in self._parts]
            return
        if way == "int8":
            quantizer = Quantizer() if quantizer is None else quantizer
            self._rounded = [quantizer(linear) for linear in linears]
            pairs = zip(self._rounded, self._parts, strict=True)
            self._few = [FewRows([(rounded, bias_O)], first_OD.dtype) for rounded, (_, bias_O) in pairs]
            self.num_bytes = sum(rounded.num_bytes for rounded in self._rounded)
            return
        biases = [bias_O for _, bias_O in self._parts if bias_O is not None]
        self._bias_O = torch.cat(biases) if biases else None
        single = len(self._parts) == 1
        weight_OD = first_OD if single else torch.cat([weight_OD for weight_OD, _ in self._parts])
        self._few_rows = _FEW_ROWS if weight_OD.dtype == torch.float32 else 0
        self._weight = weight_OD
        if way == "packed":
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), _PACKING_ROWS)
        if way == "packed" or not single:
            self.num_bytes = weight_OD.numel() * weight_OD.element_size()

    @property
    def matrices(self) -> list[tuple[Tensor | IntegerWeight, Tensor | None]]:
        """What the kernel multiplies by, with biases; of "kernel" and "int8"."""
        if self.way == "int8":
            return [(rounded, bias_O) for rounded, (_, bias_O) in zip(self._rounded, self._parts, strict=True)]
        return list(self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]."""
        rows = x.numel() // x.shape[-1]
        if self.way in ("kernel", "int8"):
            return self._by_kernel(x) if rows <= MOST_ROWS else self._one_by_one(x)
        if self.way == "plain":
            assert self._weight is not None
            return F.linear(x, self._weight, self._bias_O)
        if rows <= self._few_rows:
            return self._one_by_one(x)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias_O, "none", [], "")
        return product

    def _one_by_one(self, x: Tensor) -> Tensor:
        if self.way == "int8":
            weights = (rounded.dequantized(x.dtype) for rounded in self._rounded)
            products = [F.linear(x, weight, bias) for weight, (_, bias) in zip(weights, self._parts, strict=True)]
            return torch.cat(products, dim=-1)
        if len(self._parts) == 1:
            return F.linear(x, *self._parts[0])
        return torch.cat([F.linear(x, weight_OD, bias_O) for weight_OD, bias_O in self._parts], dim=-1)

    def _by_kernel(self, x: Tensor) -> Tensor:
        x_RD = x.reshape(-1, x.shape[-1]).contiguous()
        out_RO = x.new_empty(x_RD.shape[0], self._outputs)
        begin = 0
        for (weight_OD, _), product in zip(self._parts, self._few, strict=True):
            end = begin + weight_OD.shape[0]
            product(x_RD, out_RO[:, begin:end])
            begin = end
        return out_RO.view(*x.shape[:-1], self._outputs)


def fastest_way(weight: Tensor) -> Way:
    """How products with such a matrix are made fastest on this machine."""
    if kernel_for(weight) is not None:
        return "kernel"
    return "packed" if can_pack(weight) else "plain"


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a packed layout for such a matrix: float32 or bfloat16 on a CPU."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
