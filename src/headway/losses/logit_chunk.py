"""Logits of a few rows, made and turned into gradients in place.

Legend: C rows of a chunk, D width, R any width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.functional.logits import SoftCap


@dataclass(frozen=True)
class LogitChunk:
    """Some rows of one set of logits: the soft-capped sum of hidden[i] @ weights[i].T.

    Attributes:
        hidden: [C, R] each, rows without a target zeroed.
        weights: [V, R] each.
        logits_CV: float32, or float64; the chunk's one buffer, for its owner to overwrite.
        cap_slope_CV: derivative of the soft-capping, where there is one and gradients are wanted.
    """

    hidden: Sequence[Tensor]
    weights: Sequence[Tensor]
    logits_CV: Tensor
    cap_slope_CV: Tensor | None

    @classmethod
    def of(
        cls,
        hidden: Sequence[Tensor],
        weights: Sequence[Tensor],
        *,
        valid_C1: Tensor,
        soft_cap: SoftCap,
        wants_gradients: bool,
    ) -> LogitChunk:
        """Multiply. Rows that are not valid are zeroed before, not multiplied by zero, so that NaN in padding stays there."""
        hidden = [states_CR.masked_fill(~valid_C1, 0) for states_CR in hidden]
        logits_CV = hidden[0] @ weights[0].T
        for states_CR, weight_VR in zip(hidden[1:], weights[1:], strict=True):
            logits_CV.addmm_(states_CR, weight_VR.T)
        if logits_CV.dtype not in (torch.float32, torch.float64):
            logits_CV = logits_CV.float()
        cap_slope_CV = None
        if soft_cap.cap is not None:
            logits_CV = soft_cap(logits_CV)
            if wants_gradients:
                cap_slope_CV = 1 - (logits_CV / soft_cap.cap).square_()
        return cls(hidden, weights, logits_CV, cap_slope_CV)

    def backward(
        self,
        grad_logits_CV: Tensor,
        *,
        grad_hidden: Sequence[Tensor | None],
        grad_weights: Sequence[Tensor | None],
        factor: Tensor,
    ) -> None:
        """Fill grad_hidden and add factor x gradient to grad_weights.

        Args:
            grad_logits_CV: with respect to the soft-capped logits, zero where a row is not valid; overwritten.
            grad_hidden: as `hidden`; None is not wanted.
            grad_weights: as `weights`; None is not wanted.
            factor: a scalar.
        """
        if self.cap_slope_CV is not None:
            grad_logits_CV.mul_(self.cap_slope_CV)
        grad_logits_CV = grad_logits_CV.to(self.weights[0].dtype)
        for states_CR, weight_VR, grad_CR, grad_VR in zip(
            self.hidden, self.weights, grad_hidden, grad_weights, strict=True
        ):
            if grad_CR is not None:
                torch.mm(grad_logits_CV, weight_VR, out=grad_CR)
            if grad_VR is not None:
                _add_weight_gradient(grad_VR, grad_logits_CV, states_CR, factor)


def _add_weight_gradient(grad_VR: Tensor, grad_logits_CV: Tensor, hidden_CR: Tensor, factor: Tensor) -> None:
    if grad_logits_CV.dtype == grad_VR.dtype:
        grad_VR.addmm_(grad_logits_CV.T, hidden_CR * factor)
    else:
        grad_VR.add_((grad_logits_CV.T @ hidden_CR).to(grad_VR.dtype) * factor)
