"""What auxiliary objectives train beside the heads; they have no part in any prediction.

Legend: D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.heads.parts import BaseParts, draw


class TokenOrderHead(nn.Module):
    """The unembedding of token-order prediction.

    Attributes:
        to_scores: weight [V, D], applied to the hidden state after the final norm.

    Source: Zuhri et al. 2025 (arXiv:2508.19228).
    """

    def __init__(self, parts: BaseParts) -> None:
        super().__init__()
        self.to_scores = parts.linear(parts.width, parts.vocabulary)


class RegisterTokens(nn.Module):
    """The embedding of register tokens, one for all.

    Attributes:
        embedding: weight [1, D].

    Source: MuToR (arXiv:2505.10518).
    """

    def __init__(self, parts: BaseParts) -> None:
        super().__init__()
        weight = parts.unembedding.weight
        self.embedding = nn.Embedding(1, parts.width, device=weight.device, dtype=weight.dtype)
        draw(self.embedding, parts.initialize)

    def beside(self, embedded_BTD: Tensor) -> Tensor:
        """As many registers as there are tokens."""
        registers_BTD = self.embedding.weight.expand(embedded_BTD.shape)
        return torch.cat((embedded_BTD, registers_BTD.to(embedded_BTD.dtype)), dim=1)

    def distances(self, rows: int, farthest: int) -> Tensor:
        """How far ahead the registers of each row predict: int64 [B], uniform over 1..farthest."""
        # On the host: the same numbers whatever the device, from the generator that a checkpoint restores.
        return torch.randint(1, farthest + 1, (rows,))
