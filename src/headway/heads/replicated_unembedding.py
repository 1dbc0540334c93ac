"""Replicated unembeddings: offsets differ in nothing but their output matrix.

Legend: D width, V vocabulary.

    logits_k = U_k norm(r),   U_k of V x D, r the output of the last layer

U_k starts as a copy of the base's unembedding. Costs n - 1 times V x D weights, which is why the paper calls it
prohibitive for words and uses it for bytes.

Source: Gloeckle et al. 2024 (arXiv:2404.19737), appendix B and the caption of Table S13 (byte-level models).
"""

from __future__ import annotations

from torch import Tensor

from headway.heads.base import BaseParts, HeadInputs, Heads, Reading
from headway.heads.options import HeadOptions


class ReplicatedUnembeddings(Heads):
    """One output matrix per offset, no bodies."""

    uses_final_norm = False
    reading = Reading("final_hidden")

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        super().__init__((), num_heads=num_heads, unembeddings=parts.new_unembeddings(num_heads))

    def future_hidden(self, inputs: HeadInputs, *, num_heads: int) -> tuple[Tensor, ...]:
        """See `Heads.future_hidden`: the same hidden states for every offset."""
        return (inputs.hidden_BTD,) * num_heads
