"""What a multi-token model is trained on: from the hidden states of a pass to the loss.

Legend: B batch, T positions, N future tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from headway.losses.chunked import LowRankBias, MultiTokenLoss, chunked_loss
from headway.model.output import OffsetHiddenStates

if TYPE_CHECKING:
    from headway.model.multi_token_lm import MultiTokenLM


def model_loss(
    model: MultiTokenLM,
    states: OffsetHiddenStates,
    labels_BT: Tensor,
    *,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    padding_mask_BT: Tensor | None = None,
    num_valid_targets_N: Tensor | None = None,
) -> MultiTokenLoss:
    """The loss of one pass over all offsets; see `MultiTokenLM.forward`.

    Args:
        model: gives norm, unembeddings and weights.
        states: of the pass.
        labels_BT: unshifted token ids; -100 is ignored.
        position_ids_BT: see `headway.functional.targets.shift_targets`.
        document_ids_BT: see `headway.functional.targets.shift_targets`.
        padding_mask_BT: see `headway.functional.targets.shift_targets`.
        num_valid_targets_N: divide by these counts instead of this pass's own.

    Raises:
        DataError: a label outside the vocabulary.
    """
    return chunked_loss(
        [model.before_unembedding(hidden, offset=k) for k, hidden in enumerate(states.hidden, start=1)],
        [model.unembedding(offset).weight for offset in range(1, model.num_future_tokens + 1)],
        labels_BT.to(states.last_hidden_BTD.device),
        offset_weights=model.mtp_config.offset_weights,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
        attention_mask_BT=padding_mask_BT,
        num_valid_targets_N=num_valid_targets_N,
        soft_cap=model.family.soft_cap,
        chunk_tokens=model.mtp_config.loss_chunk_tokens,
        biases=_biases(model, states),
    )


def _biases(model: MultiTokenLM, states: OffsetHiddenStates) -> list[LowRankBias | None] | None:
    markov = model.heads.markov
    if markov is None:
        return None
    return [
        None if previous_BT is None else LowRankBias(markov.states(previous_BT), markov.to_logits.weight)
        for previous_BT in states.previous
    ]
