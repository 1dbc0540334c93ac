"""Markov bias: what the previously drafted token adds to a parallel head's logits.

Legend: B batch, T positions, R rank, V vocabulary.

Source: DSpark (arXiv:2607.05147): p_k(v) ~ exp(U_k(v) + B(x_{k-1}, v)) with B = W1[x_{k-1}] W2 of rank 256, one pair of
matrices for all offsets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MarkovBias(nn.Module):
    """logits_k += W1[x_{k-1}] W2, where x_{k-1} is the token at the previous offset.

    Attributes:
        previous: W1 [V, R].
        to_logits: W2 as a linear map, weight [V, R].
    """

    def __init__(
        self,
        vocabulary: int,
        rank: int,
        *,
        initialize: Callable[[nn.Module], None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.previous = nn.Embedding(vocabulary, rank, device=device, dtype=dtype)
        self.to_logits = nn.Linear(rank, vocabulary, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            initialize(self.previous)
            initialize(self.to_logits)

    def states(self, previous: Tensor) -> Tensor:
        """W1[x] for token ids of any shape -> [..., R]; ids of -100 (no such token) give those of token 0."""
        states: Tensor = self.previous(previous.clamp(min=0))
        return states

    def forward(self, previous: Tensor) -> Tensor:
        """The bias [..., V] after each of these tokens."""
        bias: Tensor = self.to_logits(self.states(previous))
        return bias
