"""Replicated unembeddings: offsets differ in nothing but their output matrix.

Legend: D width, V vocabulary, L layers of the base.

    logits_k = U_k norm(r),   U_k of V x D, r the output of the last layer (of layer L - j with `tap_back=j`)

U_k starts as a copy of the base's unembedding. Costs n - 1 times V x D weights, which is why the paper calls it
prohibitive for words and uses it for bytes.

Source: Gloeckle et al. 2024 (arXiv:2404.19737), appendix B and the caption of Table S13 (byte-level models).
"""

from __future__ import annotations

from torch import Tensor

from headway.heads.base import HeadInputs, ParallelHeads, Reading
from headway.heads.options import HeadOptions
from headway.heads.parts import BaseParts


class ReplicatedUnembeddings(ParallelHeads):
    """One output matrix per offset, no bodies."""

    uses_final_norm = False

    def __init__(self, parts: BaseParts, options: HeadOptions, *, num_heads: int) -> None:
        super().__init__((), num_heads=num_heads, unembeddings=parts.new_unembeddings(num_heads))
        self.reading = Reading("final_hidden", options.tap_back)

    def head(self, inputs: HeadInputs, offset: int) -> Tensor:
        """See `ParallelHeads.head`: the same hidden states for every offset."""
        return inputs.hidden_BTD
