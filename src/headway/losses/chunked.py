"""The multi-token loss with one chunk of one offset's logits alive at a time.

Legend: B batch, T positions, M = B*T rows, C rows of a chunk, D width, V vocabulary, N future tokens.

The heads' bodies stay in ordinary autograd; only unembedding + softmax + cross-entropy are one autograd function whose
inputs are hidden states and the unembedding. That is why it is exact under DDP and FSDP2, where running the heads inside
such a function loses gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.errors import ConfigError, DataError
from headway.functional.logits import SoftCap
from headway.functional.targets import IGNORE_INDEX, shift_targets
from headway.losses.distillation import BUFFERS, ChunkValues, Distribution, Teacher, distilled_chunk
from headway.losses.logit_chunk import LogitChunk
from headway.losses.objective import TrainingObjective


@dataclass(frozen=True)
class MultiTokenLoss:
    """Value of the loss.

    Attributes:
        total: scalar with a graph: sum over offsets of weight x summed nats / count.
        per_offset_N: detached mean nats over each offset's targets, [N]: the cross-entropy, whatever the objective. 0 where
            an offset has no target, NaN where its weight is 0, for then it is not computed.
        num_targets_N: valid targets of this call, int64 [N].
        num_correct_N: of them, those that no other token outscores, int64 [N]: divided by the targets, the accuracy. A tie
            counts as correct. 0 where the weight is 0. None where the loss has no targets that are tokens.
        objective_per_offset_N: like per_offset_N, the trained value; another one only where an offset is distilled.
        auxiliary: detached nats of an auxiliary objective that is part of the total, before its weight; None without one.
    """

    total: Tensor
    per_offset_N: Tensor
    num_targets_N: Tensor
    num_correct_N: Tensor | None = None
    objective_per_offset_N: Tensor | None = None
    auxiliary: Tensor | None = None


@dataclass(frozen=True)
class Distillation:
    """Which offsets learn from whom.

    Attributes:
        objective: divergence, share of the cross-entropy, temperature.
        teacher: of the next token; offset k learns from its distribution k - 1 positions later.
        first_offset: 2, or 1 where the next token is distilled as well.
    """

    objective: TrainingObjective
    teacher: Teacher
    first_offset: int = 2


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
    hidden_per_offset: Sequence[Tensor | None],
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
    distillation: Distillation | None = None,
) -> MultiTokenLoss:
    """Multi-token cross-entropy, flat in memory.

    Equal to `headway.losses.reference.reference_loss` (same value and gradients); peak logits O(chunk_tokens x V)
    instead of O(N x B x T x V), and one gradient buffer per distinct unembedding. Softmax and sums are in float32, in
    float64 when the hidden states are. Under autocast the product with the unembedding runs in the autocast type, as an
    `nn.Linear` would.

    Args:
        hidden_per_offset: N tensors [B, T, D] after the final norm; item k-1 predicts the token k ahead. None where the
            offset's weight is 0. One tensor that stands several times, with one unembedding, is multiplied once.
        weight_VD: the unembedding shared by all offsets, or one per offset.
        labels_BT: unshifted token ids; -100 is ignored.
        offset_weights: N factors; all 1 (the paper) when None. Offsets with 0 are not computed.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.
        attention_mask_BT: see `headway.functional.targets.shift_targets`.
        num_valid_targets_N: divide by these counts (a whole optimizer step's) instead of this call's own.
        soft_cap: the family's logit soft-capping.
        chunk_tokens: rows of logits that are alive at once.
        biases: N summands of the logits before soft-capping, or None where an offset has none.
        distillation: a teacher for some of the offsets; None trains all with cross-entropy.

    Returns:
        `MultiTokenLoss`.

    Raises:
        DataError: a label that is neither -100 nor a token of the vocabulary (checked on CPU, where it costs nothing), or
            counts of another length than N.
        ConfigError: all offset weights are 0.

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
        distillation=distillation,
    )


def loss_of_targets(
    hidden_per_offset: Sequence[Tensor | None],
    weight_VD: Unembeddings,
    targets_NM: Tensor,
    *,
    offset_weights: Sequence[float],
    counts_N: Tensor | None = None,
    soft_cap: SoftCap | None = None,
    chunk_tokens: int = 1024,
    biases: Sequence[LowRankBias | None] | None = None,
    distillation: Distillation | None = None,
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
        distillation: a teacher for some of the offsets.

    Raises:
        ConfigError: all offset weights are 0.
    """
    num_targets_N = (targets_NM != IGNORE_INDEX).sum(dim=1)
    weights: list[Tensor] = []
    hidden: list[Tensor] = []
    groups: list[_Logits] = []
    for index, weight in enumerate(_per_offset(weight_VD, len(hidden_per_offset))):
        states_BTD = hidden_per_offset[index]
        if offset_weights[index] == 0 or states_BTD is None:
            assert offset_weights[index] == 0, "an offset with a weight has hidden states"
            continue
        distilled = distillation is not None and index + 1 >= distillation.first_offset
        bias = None if biases is None else biases[index]
        same = None if bias is not None or distilled else _same_logits(groups, hidden, weights, states_BTD, weight)
        if same is not None:
            groups[same] = replace(groups[same], offsets=(*groups[same].offsets, index))
            continue
        pairs = [(states_BTD, weight)]
        if bias is not None:
            pairs.append((bias.hidden_BTR, bias.weight_VR))
        places = []
        for states, factor in pairs:
            known = next((place for place, other in enumerate(weights) if other is factor), len(weights))
            if known == len(weights):
                weights.append(factor)
            places.append((len(hidden), known))
            hidden.append(states)
        groups.append(_Logits(tuple(places), (index,), distilled))
    if not groups:
        raise ConfigError(
            f"all offset weights are 0, so there is nothing to train: got {list(offset_weights)}; give one offset a weight"
        )
    hidden, weights = _as_linear_would(hidden, weights)
    if distillation is not None:
        teacher = distillation.teacher
        (states_BTD,), (weight,) = _as_linear_would([teacher.hidden_BTD.detach()], [teacher.weight_VD.detach()])
        distillation = replace(distillation, teacher=Teacher(states_BTD, weight, teacher.soft_cap))
    sum_dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    divisors_N = (num_targets_N if counts_N is None else counts_N.to(num_targets_N.device)).clamp(min=1)
    factors_N = torch.tensor(list(offset_weights), dtype=sum_dtype, device=targets_NM.device) / divisors_N.to(sum_dtype)
    total, values_N, nats_N, correct_N = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        targets_NM,
        factors_N,
        soft_cap or SoftCap(),
        chunk_tokens,
        tuple(groups),
        distillation,
        *weights,
        *(h.flatten(0, 1) for h in hidden),
    )
    skipped_N = factors_N == 0
    means = [
        (sums_N / num_targets_N.clamp(min=1).to(sum_dtype)).masked_fill_(skipped_N, torch.nan)
        for sums_N in (nats_N, values_N)
    ]
    return MultiTokenLoss(
        total=total,
        per_offset_N=means[0],
        num_targets_N=num_targets_N,
        num_correct_N=correct_N,
        objective_per_offset_N=means[1],
    )


def _same_logits(
    groups: Sequence[_Logits], hidden: Sequence[Tensor], weights: Sequence[Tensor], states_BTD: Tensor, weight: Tensor
) -> int | None:
    """Where the same hidden states are multiplied by the same matrix already, with cross-entropy and no bias."""
    for place, group in enumerate(groups):
        (first, *more) = group.pairs
        if not more and not group.distilled and hidden[first[0]] is states_BTD and weights[first[1]] is weight:
            return place
    return None


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


@dataclass(frozen=True)
class _Logits:
    """One set of logits and the offsets that it is scored against, usually one.

    Attributes:
        pairs: the logits are the sum of hidden[i] @ weights[j].T over these pairs (i, j).
        offsets: index 0 is offset 1.
        distilled: whether the offset (a single one then) is trained towards the teacher.
    """

    pairs: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    distilled: bool


_FIXED = 6  # arguments of the function below before its tensors


class _ChunkedLoss(torch.autograd.Function):
    """Sum over offsets of factor x summed loss; gradients are computed in forward, chunk by chunk.

    One function for all offsets keeps a single gradient buffer per unembedding alive, whatever N is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        targets_NM: Tensor,
        factors_N: Tensor,
        soft_cap: SoftCap,
        chunk_tokens: int,
        groups: tuple[_Logits, ...],
        distillation: Distillation | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_weights = 1 + max(weight for group in groups for _, weight in group.pairs)
        weights, hidden = tensors[:num_weights], tensors[num_weights:]
        needs = ctx.needs_input_grad[_FIXED:]
        values_N, nats_N = torch.zeros_like(factors_N), torch.zeros_like(factors_N)
        correct_N = torch.zeros_like(factors_N, dtype=torch.long)
        grad_weights = [
            torch.zeros_like(weight, dtype=factors_N.dtype) if needed else None
            for weight, needed in zip(weights, needs[:num_weights], strict=True)
        ]
        needs_hidden = any(needs[num_weights:])
        grad_hidden: list[Tensor | None] = [torch.empty_like(h) if needs_hidden else None for h in hidden]

        def arguments(group: _Logits, rows: slice) -> dict[str, Any]:
            return {
                "hidden": [hidden[i][rows] for i, _ in group.pairs],
                "weights": [weights[j] for _, j in group.pairs],
                "soft_cap": soft_cap,
                "grad_hidden": [None if (grad := grad_hidden[i]) is None else grad[rows] for i, _ in group.pairs],
                "grad_weights": [grad_weights[j] for _, j in group.pairs],
                "factor": factors_N[group.offsets[0]],
            }

        num_rows = targets_NM.shape[1]
        for group in groups:
            if group.distilled:
                continue
            factors_K = torch.stack([factors_N[offset] for offset in group.offsets])
            targets_MK = torch.stack([targets_NM[offset] for offset in group.offsets], dim=1)
            for start in range(0, num_rows, chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                nats_K, correct_K = _chunk(
                    targets_MK[rows], shares_K=factors_K / factors_K[0], **arguments(group, rows)
                )
                for place, offset in enumerate(group.offsets):
                    nats_N[offset] += nats_K[place]
                    correct_N[offset] += correct_K[place]
            for offset in group.offsets:
                values_N[offset] = nats_N[offset]
        distilled = [group for group in groups if group.distilled]
        if distillation is not None and distilled:
            for group in distilled:
                # The last positions have no teacher that far ahead, and no target either.
                for i, _ in group.pairs:
                    if (grad := grad_hidden[i]) is not None:
                        grad[max(0, num_rows - group.offsets[0]) :].zero_()
            # As much memory as the cross-entropy takes: several buffers of so many fewer rows.
            for start in range(0, num_rows, teacher_rows := max(1, chunk_tokens // BUFFERS)):
                stop = min(start + teacher_rows, num_rows)
                taught = distillation.teacher.distribution(
                    slice(start, stop), temperature=distillation.objective.temperature, dtype=factors_N.dtype
                )
                for group in distilled:
                    # Position t of offset k learns from the teacher's next-token distribution at t + k - 1.
                    ahead = group.offsets[0]
                    rows = slice(max(0, start - ahead), max(0, stop - ahead))
                    if rows.start == rows.stop:
                        continue
                    values = _distilled(
                        targets_NM[ahead, rows],
                        taught[rows.start + ahead - start : rows.stop + ahead - start],
                        distillation.objective,
                        **arguments(group, rows),
                    )
                    values_N[ahead] += values.value
                    nats_N[ahead] += values.nats
                    correct_N[ahead] += values.correct
        ctx.save_for_backward(factors_N, *(grad for grad in grad_hidden if grad is not None))
        ctx.grad_weights = [
            None if grad is None else grad.to(weight.dtype) for grad, weight in zip(grad_weights, weights, strict=True)
        ]
        ctx.offset_of = [group.offsets[0] for group in groups for _ in group.pairs]
        ctx.mark_non_differentiable(values_N, nats_N, correct_N)
        ctx.set_materialize_grads(False)
        return (values_N * factors_N).sum(), values_N, nats_N, correct_N

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
    targets_CK: Tensor,
    *,
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    soft_cap: SoftCap,
    grad_hidden: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    factor: Tensor,
    shares_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and correct targets [K] of one chunk; fills grad_hidden, adds to grad_weights.

    Works in place on one [C, V] buffer. K targets share the logits; the gradient is that of the sum over them, weighted
    with `shares_K`.
    """
    valid_CK = targets_CK != IGNORE_INDEX
    labels_CK = targets_CK.clamp(min=0)
    wants_gradients = any(grad is not None for grad in (*grad_hidden, *grad_weights))
    chunk = LogitChunk.of(
        hidden,
        weights,
        valid_C1=valid_CK.any(dim=1, keepdim=True),
        soft_cap=soft_cap,
        wants_gradients=wants_gradients,
    )
    buffer_CV = chunk.logits_CV
    buffer_CV.sub_(buffer_CV.amax(dim=1, keepdim=True))
    label_logits_CK = buffer_CV.gather(1, labels_CK)
    # The largest logit has just become 0, so the argmax costs no pass over the vocabulary.
    correct_K = ((label_logits_CK == 0) & valid_CK).sum(dim=0)
    buffer_CV.exp_()
    sum_exp_C1 = buffer_CV.sum(dim=1, keepdim=True)
    nats_K = (sum_exp_C1.log() - label_logits_CK).masked_fill_(~valid_CK, 0).sum(dim=0)
    if not wants_gradients:
        return nats_K, correct_K
    coefficients_CK = valid_CK * shares_K
    # Rows without a target were zeroed in the product: their probabilities are finite, and 0 from here on.
    buffer_CV.mul_(coefficients_CK.sum(dim=1, keepdim=True) / sum_exp_C1)
    buffer_CV.scatter_add_(1, labels_CK, -coefficients_CK)
    chunk.backward(buffer_CV, grad_hidden=grad_hidden, grad_weights=grad_weights, factor=factor)
    return nats_K, correct_K


def _distilled(
    targets_C: Tensor,
    taught: Distribution,
    objective: TrainingObjective,
    *,
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    soft_cap: SoftCap,
    grad_hidden: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    factor: Tensor,
) -> ChunkValues:
    wants_gradients = any(grad is not None for grad in (*grad_hidden, *grad_weights))
    valid_C1 = (targets_C != IGNORE_INDEX)[:, None]
    chunk = LogitChunk.of(hidden, weights, valid_C1=valid_C1, soft_cap=soft_cap, wants_gradients=wants_gradients)
    return distilled_chunk(
        targets_C,
        chunk,
        taught,
        objective=objective,
        grad_hidden=grad_hidden,
        grad_weights=grad_weights,
        factor=factor,
        wants_gradients=wants_gradients,
    )
