"""Medusa heads: residual SiLU blocks on the final hidden state, own or shared unembedding.

Legend: D width, V vocabulary.

    logits_k = U_k g_m(... g_1(h)),   g_j(x) = x + SiLU(W_j x + b_j),   h the base's hidden state after its final norm

W and b start at zero and U_k as a copy of the base's unembedding: every head begins as the next-token head. Blocks are
separate modules (the reference code repeats one block where m > 1 and leaves its bias drawn at random).

Source: Cai et al. 2024 (arXiv:2401.10774), section 2.1.1; the shared unembedding is that of its later checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

from headway.heads.base import BaseParts, HeadInputs, Heads, Reading
from headway.heads.options import HeadOptions
from headway.heads.silu_block import SiluBlock


class MedusaHeads(Heads):
    """One stack of blocks per offset."""

    uses_final_norm = False
    reading = Reading("final_hidden")

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        own = options.own_unembedding is not False
        super().__init__(
            [nn.Sequential(*(SiluBlock(parts) for _ in range(options.blocks_per_head))) for _ in range(num_heads)],
            num_heads=num_heads,
            unembeddings=parts.new_unembeddings(num_heads) if own else None,
        )

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`."""
        return tuple(body(inputs.hidden_BTD) for body in self.bodies[:num_heads])
