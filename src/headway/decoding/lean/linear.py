"""Linear maps for decoding: several matrices that read the same input as one, packed for the processor where that pays.

Legend: R rows of the input, D inputs, O outputs.

A step of decoding multiplies few rows by all weights of a model, so its time is the time of reading them. On a CPU the plain
float32 product loses half of the memory's bandwidth from four rows on and the plain bfloat16 one loses it always; oneDNN's
packed layout does not (`docs/decisions/0012-lean-executor.md` has the figures). The packed copy lies beside the weights, which
stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKING_ROWS = 16
"""oneDNN chooses the layout for so many rows; results of 2 to 16 rows are then equal bit for bit up to K of about 1024."""

_FEW_ROWS = 3
"""Up to so many rows the plain float32 product is as fast as memory allows."""


class FusedLinear:
    """y = [x W_1^T + b_1, x W_2^T + b_2, ...], without gradients.

    Attributes:
        packed: whether products go through oneDNN's layout.
        num_bytes: of the copy made here; 0 where the weights are used as they are.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, pack: bool) -> None:
        """Fuse maps of the same input.

        Args:
            linears: in the order of their outputs.
            pack: use the packed layout (`can_pack` says where it exists).
        """
        self.packed = pack
        self._parts = [(linear.weight.detach(), _detached(linear.bias)) for linear in linears]
        weights = [weight_OD for weight_OD, _ in self._parts]
        biases = [bias_O for _, bias_O in self._parts]
        single = len(linears) == 1
        weight_OD = weights[0] if single else torch.cat(weights)
        self._bias_O = biases[0] if single or biases[0] is None else torch.cat([b for b in biases if b is not None])
        self._few_rows = _FEW_ROWS if pack and weight_OD.dtype == torch.float32 else 0
        self._weight: Tensor = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), _PACKING_ROWS) if pack else weight_OD
        )
        self.num_bytes = weight_OD.numel() * weight_OD.element_size() if pack or not single else 0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]."""
        if not self.packed:
            return F.linear(x, self._weight, self._bias_O)
        if x.numel() <= self._few_rows * x.shape[-1]:
            if len(self._parts) == 1:
                return F.linear(x, *self._parts[0])
            return torch.cat([F.linear(x, weight_OD, bias_O) for weight_OD, bias_O in self._parts], dim=-1)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias_O, "none", [], "")
        return product


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
