"""Medusa heads: residual SiLU blocks on the final hidden state, own or shared unembedding.

Legend: D width, V vocabulary, L layers of the base.

    logits_k = U_k g_m(... g_1(h)),   g_j(x) = x + SiLU(W_j x + b_j),   h the base's hidden state after its final norm

With `tap_back=j` h is what layer L - j gives, after the final norm. W and b start at zero and U_k as a copy of the base's
unembedding: every head begins as the next-token head (of layer L - j with a tap). Blocks are separate modules (the reference
code repeats one block where m > 1 and leaves its bias drawn at random).

Source: Cai et al. 2024 (arXiv:2401.10774), section 2.1.1; the shared unembedding is that of its later checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

from headway.heads.base import HeadInputs, ParallelHeads, Reading
from headway.heads.options import HeadOptions
from headway.heads.parts import BaseParts
from headway.heads.silu_block import SiluBlock


class MedusaHeads(ParallelHeads):
    """One stack of blocks per offset."""

    uses_final_norm = False

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        own = options.own_unembedding is not False
        super().__init__(
            [nn.Sequential(*(SiluBlock(parts) for _ in range(options.blocks_per_head))) for _ in range(num_heads)],
            num_heads=num_heads,
            unembeddings=parts.new_unembeddings(num_heads) if own else None,
        )
        self.reading = Reading("final_hidden", options.tap_back)

    def head(self, inputs: HeadInputs, offset: int) -> Tensor:
        """See `ParallelHeads.head`."""
        hidden_BTD: Tensor = self.bodies[offset - 2](inputs.hidden_BTD)
        return hidden_BTD
