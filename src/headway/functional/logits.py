"""What a model family does to its logits after the unembedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftCap:
    """Logit soft-capping, `cap * tanh(logits / cap)` (Gemma 2 and 3).

    Attributes:
        cap: the bound on the absolute logit; None leaves logits as they are.
    """

    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The capped logits, same shape and dtype; the formula in the order in which the families write it."""
        if self.cap is None:
            return logits
        return torch.tanh(logits / self.cap) * self.cap
