"""The residual block of Medusa and Hydra heads: x + SiLU(W x + b), the identity at first.

Source: Cai et al. 2024 (arXiv:2401.10774), section 2.1.1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from headway.heads.parts import BaseParts


def zero_linear(parts: BaseParts, inputs: int, outputs: int) -> nn.Linear:
    """A linear map with bias whose weights are all zero at first, so that SiLU of it is too."""
    linear = parts.linear(inputs, outputs, bias=True)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class SiluBlock(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, parts: BaseParts) -> None:
        super().__init__()
        self.inner = zero_linear(parts, parts.width, parts.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output, of the input's shape."""
        return hidden + F.silu(self.inner(hidden))
