"""The multi-token loss with one chunk of one offset's logits alive at a time.

Legend: B batch, T positions, M = B*T rows, C rows of a chunk, D width, V vocabulary, N future tokens.

The heads' bodies stay in ordinary autograd; only unembedding + softmax + cross-entropy are one autograd function whose
inputs are hidden states and the unembedding. That is why it is exact under DDP and FSDP2, where running the heads inside
such a function loses gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.errors import DataError
from headway.functional.logits import SoftCap
from headway.functional.targets import IGNORE_INDEX, shift_targets


@dataclass(frozen=True)
class MultiTokenLoss:
    """Value of the loss.

    Attributes:
        total: scalar with a graph: sum over offsets of weight x summed nats / count.
        per_offset_N: detached mean nats over each offset's targets, [N]; NaN-free: 0 where an offset has no target.
        num_targets_N: valid targets of this call, int64 [N].
    """

    total: Tensor
    per_offset_N: Tensor
    num_targets_N: Tensor


def chunked_loss(
    hidden_per_offset: Sequence[Tensor],
    weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    offset_weights: Sequence[float] | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
    num_valid_targets_N: Tensor | None = None,
    soft_cap: SoftCap | None = None,
    chunk_tokens: int = 1024,
) -> MultiTokenLoss:
    """Multi-token cross-entropy, flat in memory.

    Equal to `headway.losses.reference.reference_loss` (same value and gradients); peak logits O(chunk_tokens x V)
    instead of O(N x B x T x V). Softmax and sums are in float32, in float64 when the hidden states are. Under autocast
    the product with the unembedding runs in the autocast type, as an `nn.Linear` would.

    Args:
        hidden_per_offset: N tensors [B, T, D] after the final norm; item k-1 predicts the token k ahead.
        weight_VD: the unembedding shared by all offsets.
        labels_BT: unshifted token ids; -100 is ignored.
        offset_weights: N factors; all 1 (the paper) when None.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.
        attention_mask_BT: see `headway.functional.targets.shift_targets`.
        num_valid_targets_N: divide by these counts (a whole optimizer step's) instead of this call's own.
        soft_cap: the family's logit soft-capping.
        chunk_tokens: rows of logits that are alive at once.

    Returns:
        `MultiTokenLoss`.

    Raises:
        DataError: a label that is neither -100 nor a token of the vocabulary (checked on CPU, where it costs nothing), or
            counts of another length than N.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2, "Memory-efficient implementation": the same bound O(V + D)
    by chunks of the unembedding instead of head by head.
    """
    num_offsets = len(hidden_per_offset)
    _check_labels(labels_BT, vocabulary_size=weight_VD.shape[0])
    targets_NM = torch.stack(
        [
            shift_targets(
                labels_BT,
                offset=offset,
                position_ids_BT=position_ids_BT,
                document_ids_BT=document_ids_BT,
                attention_mask_BT=attention_mask_BT,
            ).flatten()
            for offset in range(1, num_offsets + 1)
        ]
    )
    counts_N = num_valid_targets_N
    if counts_N is not None and counts_N.shape != (num_offsets,):
        raise DataError(
            f"num_valid_targets must hold one count per offset: got shape {tuple(counts_N.shape)}, there are "
            f"{num_offsets} offsets; use headway.functional.targets.count_valid_targets"
        )
    return loss_of_targets(
        hidden_per_offset,
        weight_VD,
        targets_NM,
        offset_weights=(1.0,) * num_offsets if offset_weights is None else offset_weights,
        counts_N=counts_N,
        soft_cap=soft_cap,
        chunk_tokens=chunk_tokens,
    )


def loss_of_targets(
    hidden_per_offset: Sequence[Tensor],
    weight_VD: Tensor,
    targets_NM: Tensor,
    *,
    offset_weights: Sequence[float],
    counts_N: Tensor | None = None,
    soft_cap: SoftCap | None = None,
    chunk_tokens: int = 1024,
) -> MultiTokenLoss:
    """`chunked_loss` for targets that are already shifted: row i of `targets_NM` belongs to hidden states i.

    Args:
        hidden_per_offset: N tensors [B, T, D].
        weight_VD: the unembedding.
        targets_NM: what each position must predict, -100 where nothing.
        offset_weights: N factors.
        counts_N: divide by these instead of the number of targets given.
        soft_cap: the family's logit soft-capping.
        chunk_tokens: rows of logits that are alive at once.
    """
    num_targets_N = (targets_NM != IGNORE_INDEX).sum(dim=1)
    hidden, weight = _as_linear_would(hidden_per_offset, weight_VD)
    sum_dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    divisors_N = (num_targets_N if counts_N is None else counts_N.to(num_targets_N.device)).clamp(min=1)
    factors_N = torch.tensor(list(offset_weights), dtype=sum_dtype, device=targets_NM.device) / divisors_N.to(sum_dtype)
    total, sums_N = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        weight, targets_NM, factors_N, soft_cap or SoftCap(), chunk_tokens, *(h.flatten(0, 1) for h in hidden)
    )
    means_N = sums_N.detach() / num_targets_N.clamp(min=1).to(sum_dtype)
    return MultiTokenLoss(total=total, per_offset_N=means_N, num_targets_N=num_targets_N)


def _check_labels(labels_BT: Tensor, *, vocabulary_size: int) -> None:
    if labels_BT.device.type != "cpu" or labels_BT.numel() == 0:
        return
    bad = (labels_BT != IGNORE_INDEX) & ((labels_BT < 0) | (labels_BT >= vocabulary_size))
    if bool(bad.any()):
        raise DataError(
            f"labels must be token ids 0..{vocabulary_size - 1} or {IGNORE_INDEX}: got {int(labels_BT[bad][0])}; "
            f"tokenize with the model's own tokenizer or mask the position with {IGNORE_INDEX}"
        )


def _as_linear_would(hidden_per_offset: Sequence[Tensor], weight_VD: Tensor) -> tuple[list[Tensor], Tensor]:
    """Autocast does not look into an autograd function, so cast here, where autograd sees it."""
    device_type = weight_VD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if weight_VD.dtype != torch.float64:
            return [hidden.to(dtype) for hidden in hidden_per_offset], weight_VD.to(dtype)
    return [hidden.to(weight_VD.dtype) for hidden in hidden_per_offset], weight_VD


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over offsets of factor x summed cross-entropy; gradients are computed in forward, chunk by chunk.

    One function for all offsets keeps a single gradient buffer of the unembedding alive, whatever N is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        targets_NM: Tensor,
        factors_N: Tensor,
        soft_cap: SoftCap,
        chunk_tokens: int,
        *hidden_per_offset: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs_weight = ctx.needs_input_grad[0]
        needs_hidden = any(ctx.needs_input_grad[5:])
        sums_N = torch.zeros_like(factors_N)
        grad_weight_VD = None
        if needs_weight:
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=factors_N.dtype)
        grad_hidden: list[Tensor] = []
        for index, hidden_MD in enumerate(hidden_per_offset):
            grad_hidden_MD = torch.empty_like(hidden_MD) if needs_hidden else None
            for start in range(0, hidden_MD.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                sums_N[index] += _chunk(
                    hidden_MD[rows],
                    weight_VD,
                    targets_NM[index, rows],
                    soft_cap=soft_cap,
                    grad_hidden_CD=None if grad_hidden_MD is None else grad_hidden_MD[rows],
                    grad_weight_VD=grad_weight_VD,
                    factor=factors_N[index],
                )
            if grad_hidden_MD is not None:
                grad_hidden.append(grad_hidden_MD)
        ctx.save_for_backward(factors_N, *grad_hidden)
        ctx.grad_weight_VD = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        ctx.num_offsets = len(hidden_per_offset)
        ctx.mark_non_differentiable(sums_N)
        ctx.set_materialize_grads(False)
        return (sums_N * factors_N).sum(), sums_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total = grad_outputs[0]
        if grad_total is None:
            return (None,) * (5 + int(ctx.num_offsets))
        factors_N, *grad_hidden = ctx.saved_tensors
        scales_N = factors_N * grad_total
        scaled: list[Tensor | None] = [None] * ctx.num_offsets
        for index, grad_MD in enumerate(grad_hidden):
            scaled[index] = grad_MD * scales_N[index].to(grad_MD.dtype)
        grad_weight_VD: Tensor | None = ctx.grad_weight_VD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD * grad_total.to(grad_weight_VD.dtype)
        return (grad_weight_VD, None, None, None, None, *scaled)


def _chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    *,
    soft_cap: SoftCap,
    grad_hidden_CD: Tensor | None,
    grad_weight_VD: Tensor | None,
    factor: Tensor,
) -> Tensor:
    """Summed negative log-likelihood of one chunk; fills grad_hidden_CD and adds factor x gradient to grad_weight_VD.

    Works in place on one [C, V] buffer. Ignored rows are zeroed, not multiplied by zero, so that a NaN in padding stays
    there.
    """
    valid_C1 = (targets_C != IGNORE_INDEX)[:, None]
    hidden_CD = hidden_CD.masked_fill(~valid_C1, 0)
    labels_C1 = targets_C.clamp(min=0)[:, None]
    buffer_CV = hidden_CD @ weight_VD.T
    if buffer_CV.dtype not in (torch.float32, torch.float64):
        buffer_CV = buffer_CV.float()
    cap_slope_CV = None
    if soft_cap.cap is not None:
        buffer_CV = soft_cap(buffer_CV)
        if grad_hidden_CD is not None or grad_weight_VD is not None:
            cap_slope_CV = 1 - (buffer_CV / soft_cap.cap).square_()
    buffer_CV.sub_(buffer_CV.amax(dim=1, keepdim=True))
    label_logits_C1 = buffer_CV.gather(1, labels_C1)
    buffer_CV.exp_()
    sum_exp_C1 = buffer_CV.sum(dim=1, keepdim=True)
    nll_C1 = (sum_exp_C1.log() - label_logits_C1).masked_fill_(~valid_C1, 0)
    if grad_hidden_CD is None and grad_weight_VD is None:
        return nll_C1.sum()
    buffer_CV.div_(sum_exp_C1)
    buffer_CV.scatter_add_(1, labels_C1, torch.full_like(nll_C1, -1.0))
    if cap_slope_CV is not None:
        buffer_CV.mul_(cap_slope_CV)
    buffer_CV.masked_fill_(~valid_C1, 0)
    grad_logits_CV = buffer_CV.to(weight_VD.dtype)
    if grad_hidden_CD is not None:
        torch.mm(grad_logits_CV, weight_VD, out=grad_hidden_CD)
    if grad_weight_VD is not None:
        if grad_logits_CV.dtype == grad_weight_VD.dtype:
            grad_weight_VD.addmm_(grad_logits_CV.T, hidden_CD * factor)
        else:
            grad_weight_VD.add_((grad_logits_CV.T @ hidden_CD).to(grad_weight_VD.dtype) * factor)
    return nll_C1.sum()
