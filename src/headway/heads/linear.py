"""Linear heads: one linear map per offset on the residual stream.

Legend: D width, L layers of the base.

    h_k = W_k r,   W_k of D x D, r the output of layer L (of layer L - j with `tap_back=j`; j = 1 is the trunk's output z)

followed by the shared final norm and unembedding. W_k starts as the identity: every head begins as the next-token head.

Source: Gloeckle et al. 2024 (arXiv:2404.19737), appendix B and Table S4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.heads.base import HeadInputs, ParallelHeads, Reading
from headway.heads.options import HeadOptions
from headway.heads.parts import BaseParts


class LinearHeads(ParallelHeads):
    """One map per offset."""

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        maps = [parts.linear(parts.width, parts.width) for _ in range(num_heads)]
        if not parts.fresh:
            with torch.no_grad():
                for linear in maps:
                    linear.weight.copy_(torch.eye(parts.width))
        super().__init__(maps, num_heads=num_heads)
        back = options.tap_back
        self.reading = Reading("layer_input", back - 1) if back else Reading("final_residual")

    def head(self, inputs: HeadInputs, offset: int) -> Tensor:
        """See `ParallelHeads.head`."""
        hidden_BTD: Tensor = self.bodies[offset - 2](inputs.hidden_BTD)
        return hidden_BTD
