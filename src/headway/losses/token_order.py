"""Token-order prediction: rank the vocabulary by how soon each token comes next.

Legend: B batch, T positions, M = B*T rows, C rows of a chunk, D width, V vocabulary, W window.

    y_t(v) = W - d_t(v),   d_t(v) in 1..W the distance from t to the next occurrence of v; -inf where there is none
    loss_t = - sum_v softmax(y_t)(v) log_softmax(U h_t)(v)

(ListNet), U an unembedding of its own. softmax(y_t) is zero but on the tokens of the window, so no target of the
vocabulary's size is ever made: the first occurrence of a token at distance d has a weight of exp(-d).

Source: Zuhri et al. 2025 (arXiv:2508.19228) and its code, which counts distances from 0 and so looks one token further for
the same W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.functional.logits import SoftCap
from headway.functional.targets import IGNORE_INDEX, document_keys, shift_targets
from headway.losses.logit_chunk import LogitChunk


@dataclass(frozen=True)
class AuxiliaryLoss:
    """Value of an objective beside the prediction of tokens.

    Attributes:
        total: scalar with a graph: summed nats / count.
        mean: detached mean nats over this call's own targets; 0 where there is none.
        num_targets: of this call, an int64 scalar.
    """

    total: Tensor
    mean: Tensor
    num_targets: Tensor


@dataclass(frozen=True)
class UpcomingTokens:
    """What stands after each position, to be looked up for some rows at a time.

    Attributes:
        labels_BT: token ids, -100 where there is none to rank.
        former_BT: place of the same token's last occurrence before; -1 where there is none.
        keys: integers [B, T] that agree within a document.
        scored_M: whether a row has a target: whether the token after it is one.
    """

    labels_BT: Tensor
    former_BT: Tensor
    keys: tuple[Tensor, ...]
    scored_M: Tensor

    @classmethod
    def of(
        cls,
        labels_BT: Tensor,
        *,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        attention_mask_BT: Tensor | None = None,
    ) -> UpcomingTokens:
        """From unshifted labels; arguments as for `headway.functional.targets.shift_targets`."""
        next_BT = shift_targets(
            labels_BT,
            offset=1,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            attention_mask_BT=attention_mask_BT,
        )
        if attention_mask_BT is not None:
            labels_BT = labels_BT.masked_fill(~attention_mask_BT.to(labels_BT.device).bool(), IGNORE_INDEX)
        order_BT = labels_BT.argsort(dim=1, stable=True)
        sorted_BT = labels_BT.gather(1, order_BT)
        before_BT = torch.full_like(order_BT, -1)
        repeats_BT = sorted_BT[:, 1:] == sorted_BT[:, :-1]
        before_BT[:, 1:] = torch.where(repeats_BT, order_BT[:, :-1], -1)
        keys = document_keys(
            (labels_BT.shape[0], labels_BT.shape[1]),
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            device=labels_BT.device,
        )
        return cls(
            labels_BT=labels_BT,
            former_BT=torch.empty_like(before_BT).scatter_(1, order_BT, before_BT),
            keys=tuple(keys),
            scored_M=(next_BT != IGNORE_INDEX).flatten(),
        )

    def weights(self, rows: slice, *, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tokens [C, W] of the windows of some of the M rows, and softmax(y) of each (0 for all but first occurrences)."""
        length = self.labels_BT.shape[1]
        row_C = torch.arange(self.labels_BT.numel(), device=self.labels_BT.device)[rows]
        batch_C1, place_C1 = (row_C // length)[:, None], (row_C % length)[:, None]
        distance_1W = torch.arange(1, min(window, length) + 1, device=row_C.device)[None]
        inside_CW = place_C1 + distance_1W < length
        ahead_CW = (place_C1 + distance_1W).clamp(max=length - 1)
        tokens_CW = self.labels_BT[batch_C1, ahead_CW]
        counts_CW = inside_CW & (tokens_CW != IGNORE_INDEX) & (self.former_BT[batch_C1, ahead_CW] <= place_C1)
        for keys_BT in self.keys:
            counts_CW &= keys_BT[batch_C1, ahead_CW] == keys_BT[batch_C1, place_C1]
        scores_CW = torch.where(counts_CW, 1 - distance_1W.to(dtype), -torch.inf)
        # Rows without a target have no finite score; they are not counted, and must not be NaN.
        weights_CW = torch.softmax(scores_CW, dim=1).masked_fill(~self.scored_M[rows][:, None], 0)
        return tokens_CW.clamp(min=0), weights_CW


def token_order_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    upcoming: UpcomingTokens,
    *,
    window: int,
    count: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> AuxiliaryLoss:
    """The loss of the module's docstring, its mean over positions whose next token is a target.

    Peak memory O(chunk_tokens x (V + W)).

    Args:
        hidden_BTD: after the final norm.
        weight_VD: the objective's own unembedding.
        upcoming: the tokens.
        window: W, in tokens.
        count: divide by this (a whole optimizer step's) instead of this call's own number of targets.
        chunk_tokens: rows of logits that are alive at once.
    """
    number = upcoming.scored_M.sum()
    divisor = (number if count is None else count.to(number.device)).clamp(min=1)
    device_type = weight_VD.device.type
    if torch.is_autocast_enabled(device_type) and weight_VD.dtype != torch.float64:
        # Autocast does not look into an autograd function, so cast here, where autograd sees it.
        weight_VD = weight_VD.to(torch.get_autocast_dtype(device_type))
    hidden_MD = hidden_BTD.flatten(0, 1).to(weight_VD.dtype)
    total, summed = _TokenOrder.apply(upcoming, window, chunk_tokens, divisor, weight_VD, hidden_MD)  # type: ignore[no-untyped-call]
    return AuxiliaryLoss(total=total, mean=summed.detach() / number.clamp(min=1), num_targets=number)


class _TokenOrder(torch.autograd.Function):
    """Summed loss / divisor; gradients are computed in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        upcoming: UpcomingTokens,
        window: int,
        chunk_tokens: int,
        divisor: Tensor,
        weight_VD: Tensor,
        hidden_MD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
        needs_weight, needs_hidden = ctx.needs_input_grad[4:]
        factor = divisor.to(dtype).reciprocal()
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        summed = torch.zeros((), dtype=dtype, device=hidden_MD.device)
        for start in range(0, hidden_MD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            valid_C1 = upcoming.scored_M[rows][:, None]
            tokens_CW, weights_CW = upcoming.weights(rows, window=window, dtype=dtype)
            chunk = LogitChunk.of(
                [hidden_MD[rows]],
                [weight_VD],
                valid_C1=valid_C1,
                soft_cap=SoftCap(),
                wants_gradients=needs_weight or needs_hidden,
            )
            logits_CV = chunk.logits_CV
            logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
            ranked_C = (logits_CV.gather(1, tokens_CW) * weights_CW).sum(dim=1)
            sums_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
            summed += (sums_C1.log()[:, 0] - ranked_C).masked_fill_(~valid_C1[:, 0], 0).sum()
            if grad_weight is None and grad_hidden is None:
                continue
            logits_CV.div_(sums_C1).scatter_add_(1, tokens_CW, -weights_CW).masked_fill_(~valid_C1, 0)
            chunk.backward(
                logits_CV,
                grad_hidden=[None if grad_hidden is None else grad_hidden[rows]],
                grad_weights=[grad_weight],
                factor=factor,
            )
        ctx.factor, ctx.grad_hidden = factor, grad_hidden
        ctx.grad_weight = None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        ctx.mark_non_differentiable(summed)
        ctx.set_materialize_grads(False)
        return summed * factor, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total = grad_outputs[0]
        if grad_total is None:
            return (None,) * 6
        grad_weight, grad_hidden = ctx.grad_weight, ctx.grad_hidden
        return (
            *(None,) * 4,
            None if grad_weight is None else grad_weight * grad_total.to(grad_weight.dtype),
            None if grad_hidden is None else grad_hidden * (ctx.factor * grad_total).to(grad_hidden.dtype),
        )
