"""What a model is trained on: from hidden states of a pass to the loss.

Legend: B batch, T positions, D width, N future tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway.errors import ConfigError
from headway.heads.base import HeadInputs
from headway.losses.chunked import Distillation, LowRankBias, MultiTokenLoss, chunked_loss
from headway.losses.distillation import Teacher
from headway.losses.objective import TrainingObjective
from headway.model.auxiliary import auxiliary_loss
from headway.model.documents import AttentionMask
from headway.model.output import OffsetHiddenStates
from headway.model.registers import Registers
from headway.model.teacher import CausalTeacher

if TYPE_CHECKING:
    from headway.model.multi_token_lm import MultiTokenLM


def check_objective(model: MultiTokenLM, objective: TrainingObjective, teacher: CausalTeacher | None) -> None:
    """Refuse an objective that the model cannot be trained on.

    Raises:
        ConfigError: names what does not fit, and the way out.
    """
    if objective.detach_trunk != "off" and model.heads.changes_base:
        raise ConfigError(
            f"detach_trunk={objective.detach_trunk!r} cannot cut heads with wiring={model.mtp_config.wiring!r} off: the "
            f"next-token path runs through them; leave it 'off', or use wiring='parallel'"
        )
    if objective.train_on_drafts and not model.heads.reads_tokens:
        raise ConfigError(
            f"train_on_drafts is for heads that read drafted tokens (sequential, hydra): got {model.mtp_config.heads}; leave "
            f"it out"
        )
    if teacher is not None and not objective.distills:
        raise ConfigError("a teacher needs a divergence: got cross_entropy, which has none; choose one, such as kl")
    if objective.distill_next_token and teacher is None:
        raise ConfigError(
            "distill_next_token needs another model as teacher: the model's own next-token distribution cannot teach "
            "itself; pass a teacher, or leave it out"
        )
    vocabulary = model.family.lm_head.weight.shape[0]
    if teacher is not None and teacher.vocabulary != vocabulary:
        raise ConfigError(
            f"teacher and model must share a vocabulary: got {teacher.vocabulary} and {vocabulary} tokens; choose a teacher "
            f"with the same tokenizer"
        )


def scored_weights(model: MultiTokenLM, offset_weights: Sequence[float] | None) -> tuple[float, ...]:
    """The loss weights of a pass: those given, else the configuration's, else 1.

    Raises:
        ConfigError: as many weights as there are offsets are needed; more only for a model without heads, whose
            next-token logits are then scored against later tokens too.
    """
    num_offsets = model.num_future_tokens
    if offset_weights is None:
        return model.mtp_config.offset_weights or (1.0,) * num_offsets
    weights = tuple(float(weight) for weight in offset_weights)
    if len(weights) != num_offsets and (num_offsets > 1 or not weights):
        raise ConfigError(
            f"offset_weights needs one weight per offset: got {len(weights)} for num_future_tokens={num_offsets}; pass "
            f"{num_offsets} numbers, offset 1 first"
        )
    return weights


def last_scored(weights: Sequence[float]) -> int:
    """The farthest offset with a weight, at least 1: heads beyond it need not run.

    >>> last_scored((1.0, 0.5, 0.0, 0.0)), last_scored((0.0, 0.0))
    (2, 1)
    """
    return max((offset for offset, weight in enumerate(weights, start=1) if weight), default=1)


def cut_off(inputs: HeadInputs) -> HeadInputs:
    """The same without a way back for gradients: what heads read of the base, hidden states and embeddings."""
    return replace(
        inputs,
        hidden_BTD=inputs.hidden_BTD.detach(),
        call=replace(inputs.call, hidden_BTD=inputs.call.hidden_BTD.detach()),
        embed=lambda ids: inputs.embed(ids).detach(),
    )


def model_loss(
    model: MultiTokenLM,
    states: OffsetHiddenStates,
    labels_BT: Tensor,
    *,
    weights: Sequence[float],
    input_ids_BT: Tensor | None = None,
    registers: Registers | None = None,
    attention_mask: AttentionMask = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    num_valid_targets_N: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> MultiTokenLoss:
    """The loss of one pass over all offsets, in train mode with the auxiliary objective's; see `MultiTokenLM.forward`.

    Args:
        model: gives norm, unembeddings, objective and teacher.
        states: of the pass, up to the last offset with a weight at least.
        labels_BT: unshifted token ids; -100 is ignored.
        weights: from `scored_weights`.
        input_ids_BT: what the pass was fed, for another model that teaches.
        registers: of the pass, where the auxiliary objective has them.
        attention_mask: as the caller gave it.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.
        num_valid_targets_N: divide by these counts instead of this pass's own.
        num_items_in_batch: one count for all offsets, where theirs are not given.

    Raises:
        DataError: a label outside the vocabulary.
        ConfigError: no offset has a weight; embeddings instead of tokens for a teacher.
    """
    objective = model.objective
    if num_valid_targets_N is None and num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, device=states.last_hidden_BTD.device)
        num_valid_targets_N = items.reshape(-1)[:1].expand(len(weights))
    hidden: list[Tensor | None] = [states.last_hidden_BTD] + [None] * (len(weights) - 1)
    base_matrix_VD = model.family.lm_head.weight
    heads_matrix_VD = base_matrix_VD.detach() if objective.detach_trunk == "on" else base_matrix_VD
    matrices = [base_matrix_VD] * len(weights)
    if model.num_future_tokens == 1:
        # Without heads, later tokens are scored by the logits of the next one.
        hidden = [states.last_hidden_BTD] * len(weights)
    else:
        for offset, hidden_BTD in enumerate(states.hidden[1:], start=2):
            if weights[offset - 1]:
                hidden[offset - 1] = _before_unembedding(model, hidden_BTD, offset=offset)
        for offset in range(2, len(weights) + 1):
            own = model.heads.unembedding(offset)
            matrices[offset - 1] = heads_matrix_VD if own is None else own.weight
    distillation = None
    if objective.distills and model.teacher is not None:
        if input_ids_BT is None:
            raise ConfigError("a teacher reads tokens, not embeddings: got inputs_embeds alone; pass input_ids")
        teacher = model.teacher(
            input_ids_BT,
            attention_mask=attention_mask,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
        )
        distillation = Distillation(objective, teacher, first_offset=1 if objective.distill_next_token else 2)
    elif objective.distills:
        distillation = Distillation(
            objective, Teacher(states.last_hidden_BTD, base_matrix_VD, model.family.soft_cap), first_offset=2
        )
    loss = chunked_loss(
        hidden,
        matrices,
        labels_BT.to(states.last_hidden_BTD.device),
        offset_weights=weights,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
        attention_mask_BT=attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None,
        num_valid_targets_N=num_valid_targets_N,
        soft_cap=model.family.soft_cap,
        chunk_tokens=model.mtp_config.loss_chunk_tokens,
        biases=_biases(model, states, weights),
        distillation=distillation,
    )
    if not (model.training and model.heads.auxiliary is not None):
        return loss
    auxiliary = auxiliary_loss(
        model,
        states,
        labels_BT.to(states.last_hidden_BTD.device),
        registers=registers,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
        attention_mask_BT=attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None,
        count=None if num_valid_targets_N is None else num_valid_targets_N[0],
    )
    weight = model.mtp_config.auxiliary_options.weight
    return replace(loss, total=loss.total + weight * auxiliary.total, auxiliary=auxiliary.total.detach())


def likeliest(model: MultiTokenLM, hidden_BTD: Tensor, offset: int) -> Tensor:
    """The heads' likeliest tokens [B, T] of an offset, without a gradient and with one chunk of logits alive."""
    with torch.no_grad():
        chunks = torch.split(hidden_BTD.detach().flatten(0, 1), model.mtp_config.loss_chunk_tokens)
        likeliest_M = torch.cat([model.offset_logits(chunk_CD, offset=offset).argmax(dim=-1) for chunk_CD in chunks])
    return likeliest_M.view(hidden_BTD.shape[:2])


def _before_unembedding(model: MultiTokenLM, hidden_BTD: Tensor, *, offset: int) -> Tensor:
    if model.objective.detach_trunk != "on" or not model.heads.uses_final_norm:
        return model.before_unembedding(hidden_BTD, offset=offset)
    norm = model.family.norm
    fixed = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    normed_BTD: Tensor = torch.func.functional_call(norm, fixed, (hidden_BTD,))
    return normed_BTD


def _biases(
    model: MultiTokenLM, states: OffsetHiddenStates, weights: Sequence[float]
) -> list[LowRankBias | None] | None:
    markov = model.heads.markov
    if markov is None:
        return None
    biases: list[LowRankBias | None] = [None] * len(weights)
    for index, previous_BT in enumerate(states.previous):
        if previous_BT is not None and weights[index]:
            biases[index] = LowRankBias(markov.states(previous_BT), markov.to_logits.weight)
    return biases
