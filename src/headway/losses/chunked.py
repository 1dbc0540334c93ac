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
        num_correct_N: of them, those that no other token outscores, int64 [N]: divided by the targets, the accuracy. A tie
            counts as correct. None where the loss has no targets that are tokens.
    """

    total: Tensor
    per_offset_N: Tensor
    num_targets_N: Tensor
    num_correct_N: Tensor | None = None


@dataclass(frozen=True)
class LowRankBias:
    """A second summand of an offset's logits: `hidden_BTR @ weight_VR.T`, of low rank R.

    Attributes:
        hidden_BTR: per position.
        weight_VR: shared by all positions.
    """

    hidden_BTR: Tensor
    weight_VR: Tensor


Unembeddings = Tensor | Sequence[Tensor]
"""One [V, D] matrix for all offsets, or one per offset, in which the same tensor may stand several times."""


def chunked_loss(
    hidden_per_offset: Sequence[Tensor],
    weight_VD: Unembeddings,
    labels_BT: Tensor,
    *,
    offset_weights: Sequence[float] | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    attention_mask_BT: Tensor | None = None,
    num_valid_targets_N: Tensor | None = None,
    soft_cap: SoftCap | None = None,
    chunk_tokens: int = 1024,
    biases: Sequence[LowRankBias | None] | None = None,
) -> MultiTokenLoss:
    """Multi-token cross-entropy, flat in memory.

    Equal to `headway.losses.reference.reference_loss` (same value and gradients); peak logits O(chunk_tokens x V)
    instead of O(N x B x T x V), and one gradient buffer per distinct unembedding. Softmax and sums are in float32, in
    float64 when the hidden states are. Under autocast the product with the unembedding runs in the autocast type, as an
    `nn.Linear` would.

    Args:
        hidden_per_offset: N tensors [B, T, D] after the final norm; item k-1 predicts the token k ahead.
        weight_VD: the unembedding shared by all offsets, or one per offset.
        labels_BT: unshifted token ids; -100 is ignored.
        offset_weights: N factors; all 1 (the paper) when None.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.
        attention_mask_BT: see `headway.functional.targets.shift_targets`.
        num_valid_targets_N: divide by these counts (a whole optimizer step's) instead of this call's own.
        soft_cap: the family's logit soft-capping.
        chunk_tokens: rows of logits that are alive at once.
        biases: N summands of the logits before soft-capping, or None where an offset has none.

    Returns:
        `MultiTokenLoss`.

    Raises:
        DataError: a label that is neither -100 nor a token of the vocabulary (checked on CPU, where it costs nothing), or
            counts of another length than N.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2, "Memory-efficient implementation": the same bound O(V + D)
    by chunks of the unembedding instead of head by head.
    """
    num_offsets = len(hidden_per_offset)
    _check_labels(labels_BT, vocabulary_size=_per_offset(weight_VD, 1)[0].shape[0])
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
        biases=biases,
    )


def loss_of_targets(
    hidden_per_offset: Sequence[Tensor],
    weight_VD: Unembeddings,
    targets_NM: Tensor,
    *,
    offset_weights: Sequence[float],
    counts_N: Tensor | None = None,
    soft_cap: SoftCap | None = None,
    chunk_tokens: int = 1024,
    biases: Sequence[LowRankBias | None] | None = None,
) -> MultiTokenLoss:
    """`chunked_loss` for targets that are already shifted: row i of `targets_NM` belongs to hidden states i.

    Args:
        hidden_per_offset: N tensors [B, T, D].
        weight_VD: the unembedding, or one per offset.
        targets_NM: what each position must predict, -100 where nothing.
        offset_weights: N factors.
        counts_N: divide by these instead of the number of targets given.
        soft_cap: the family's logit soft-capping.
        chunk_tokens: rows of logits that are alive at once.
        biases: N summands of the logits before soft-capping, or None where an offset has none.
    """
    num_targets_N = (targets_NM != IGNORE_INDEX).sum(dim=1)
    weights: list[Tensor] = []
    hidden: list[Tensor] = []
    summands: list[_Summands] = []
    for index, weight in enumerate(_per_offset(weight_VD, len(hidden_per_offset))):
        pairs = [(hidden_per_offset[index], weight)]
        bias = None if biases is None else biases[index]
        if bias is not None:
            pairs.append((bias.hidden_BTR, bias.weight_VR))
        places = []
        for states, factor in pairs:
            known = next((place for place, other in enumerate(weights) if other is factor), len(weights))
            if known == len(weights):
                weights.append(factor)
            places.append((len(hidden), known))
            hidden.append(states)
        summands.append(tuple(places))
    hidden, weights = _as_linear_would(hidden, weights)
    sum_dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    divisors_N = (num_targets_N if counts_N is None else counts_N.to(num_targets_N.device)).clamp(min=1)
    factors_N = torch.tensor(list(offset_weights), dtype=sum_dtype, device=targets_NM.device) / divisors_N.to(sum_dtype)
    total, sums_N, correct_N = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        targets_NM,
        factors_N,
        soft_cap or SoftCap(),
        chunk_tokens,
        tuple(summands),
        *weights,
        *(h.flatten(0, 1) for h in hidden),
    )
    means_N = sums_N.detach() / num_targets_N.clamp(min=1).to(sum_dtype)
    return MultiTokenLoss(total=total, per_offset_N=means_N, num_targets_N=num_targets_N, num_correct_N=correct_N)


def _check_labels(labels_BT: Tensor, *, vocabulary_size: int) -> None:
    if labels_BT.device.type != "cpu" or labels_BT.numel() == 0:
        return
    bad = (labels_BT != IGNORE_INDEX) & ((labels_BT < 0) | (labels_BT >= vocabulary_size))
    if bool(bad.any()):
        raise DataError(
            f"labels must be token ids 0..{vocabulary_size - 1} or {IGNORE_INDEX}: got {int(labels_BT[bad][0])}; "
            f"tokenize with the model's own tokenizer or mask the position with {IGNORE_INDEX}"
        )


def _per_offset(weight_VD: Unembeddings, num_offsets: int) -> list[Tensor]:
    return [weight_VD] * num_offsets if isinstance(weight_VD, Tensor) else list(weight_VD)


def _as_linear_would(hidden: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Autocast does not look into an autograd function, so cast here, where autograd sees it."""
    device_type = weights[0].device.type
    dtype = weights[0].dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    return [states.to(dtype) for states in hidden], [weight.to(dtype) for weight in weights]


_Summands = tuple[tuple[int, int], ...]
"""One offset's logits: the sum of hidden[i] @ weights[j].T over these pairs (i, j)."""

_FIXED = 5  # arguments of the function below before its tensors


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over offsets of factor x summed cross-entropy; gradients are computed in forward, chunk by chunk.

    One function for all offsets keeps a single gradient buffer per unembedding alive, whatever N is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        targets_NM: Tensor,
        factors_N: Tensor,
        soft_cap: SoftCap,
        chunk_tokens: int,
        summands: tuple[_Summands, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_weights = 1 + max(weight for pairs in summands for _, weight in pairs)
        weights, hidden = tensors[:num_weights], tensors[num_weights:]
        needs = ctx.needs_input_grad[_FIXED:]
        sums_N = torch.zeros_like(factors_N)
        correct_N = torch.zeros_like(factors_N, dtype=torch.long)
        grad_weights = [
            torch.zeros_like(weight, dtype=factors_N.dtype) if needed else None
            for weight, needed in zip(weights, needs[:num_weights], strict=True)
        ]
        needs_hidden = any(needs[num_weights:])
        grad_hidden: list[Tensor | None] = [torch.empty_like(h) if needs_hidden else None for h in hidden]
        for index, pairs in enumerate(summands):
            for start in range(0, targets_NM.shape[1], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                nats, correct = _chunk(
                    targets_NM[index, rows],
                    [hidden[i][rows] for i, _ in pairs],
                    [weights[j] for _, j in pairs],
                    soft_cap=soft_cap,
                    grad_hidden=[None if (grad := grad_hidden[i]) is None else grad[rows] for i, _ in pairs],
                    grad_weights=[grad_weights[j] for _, j in pairs],
                    factor=factors_N[index],
                )
                sums_N[index] += nats
                correct_N[index] += correct
        ctx.save_for_backward(factors_N, *(grad for grad in grad_hidden if grad is not None))
        ctx.grad_weights = [
            None if grad is None else grad.to(weight.dtype) for grad, weight in zip(grad_weights, weights, strict=True)
        ]
        ctx.offset_of = [index for index, pairs in enumerate(summands) for _ in pairs]
        ctx.mark_non_differentiable(sums_N, correct_N)
        ctx.set_materialize_grads(False)
        return (sums_N * factors_N).sum(), sums_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_total = grad_outputs[0]
        if grad_total is None:
            return (None,) * (_FIXED + len(ctx.grad_weights) + len(ctx.offset_of))
        factors_N, *grad_hidden = ctx.saved_tensors
        scales_N = factors_N * grad_total
        scaled: list[Tensor | None] = [None] * len(ctx.offset_of)
        for place, grad_MD in enumerate(grad_hidden):
            scaled[place] = grad_MD * scales_N[ctx.offset_of[place]].to(grad_MD.dtype)
        grad_weights = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.grad_weights]
        return ((None,) * _FIXED) + (*grad_weights, *scaled)


def _chunk(
    targets_C: Tensor,
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    soft_cap: SoftCap,
    grad_hidden: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    factor: Tensor,
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and correct targets of one chunk; fills grad_hidden, adds factor x gradient to grad_weights.

    Works in place on one [C, V] buffer. Ignored rows are zeroed, not multiplied by zero, so that a NaN in padding stays
    there.
    """
    valid_C1 = (targets_C != IGNORE_INDEX)[:, None]
    hidden = [states_CD.masked_fill(~valid_C1, 0) for states_CD in hidden]
    labels_C1 = targets_C.clamp(min=0)[:, None]
    buffer_CV = hidden[0] @ weights[0].T
    for states_CR, weight_VR in zip(hidden[1:], weights[1:], strict=True):
        buffer_CV.addmm_(states_CR, weight_VR.T)
    if buffer_CV.dtype not in (torch.float32, torch.float64):
        buffer_CV = buffer_CV.float()
    wants_gradients = any(grad is not None for grad in (*grad_hidden, *grad_weights))
    cap_slope_CV = None
    if soft_cap.cap is not None:
        buffer_CV = soft_cap(buffer_CV)
        if wants_gradients:
            cap_slope_CV = 1 - (buffer_CV / soft_cap.cap).square_()
    buffer_CV.sub_(buffer_CV.amax(dim=1, keepdim=True))
    label_logits_C1 = buffer_CV.gather(1, labels_C1)
    # The largest logit has just become 0, so the argmax costs no pass over the vocabulary.
    correct = ((label_logits_C1 == 0) & valid_C1).sum()
    buffer_CV.exp_()
    sum_exp_C1 = buffer_CV.sum(dim=1, keepdim=True)
    nll_C1 = (sum_exp_C1.log() - label_logits_C1).masked_fill_(~valid_C1, 0)
    if not wants_gradients:
        return nll_C1.sum(), correct
    buffer_CV.div_(sum_exp_C1)
    buffer_CV.scatter_add_(1, labels_C1, torch.full_like(nll_C1, -1.0))
    if cap_slope_CV is not None:
        buffer_CV.mul_(cap_slope_CV)
    buffer_CV.masked_fill_(~valid_C1, 0)
    grad_logits_CV = buffer_CV.to(weights[0].dtype)
    for states_CD, weight_VD, grad_CD, grad_VD in zip(hidden, weights, grad_hidden, grad_weights, strict=True):
        if grad_CD is not None:
            torch.mm(grad_logits_CV, weight_VD, out=grad_CD)
        if grad_VD is not None:
            _add_weight_gradient(grad_VD, grad_logits_CV, states_CD, factor)
    return nll_C1.sum(), correct


def _add_weight_gradient(grad_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor, factor: Tensor) -> None:
    if grad_logits_CV.dtype == grad_VD.dtype:
        grad_VD.addmm_(grad_logits_CV.T, hidden_CD * factor)
    else:
        grad_VD.add_((grad_logits_CV.T @ hidden_CD).to(grad_VD.dtype) * factor)
