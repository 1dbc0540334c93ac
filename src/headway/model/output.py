"""What the model's forward returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from headway.heads.base import HeadInputs


@dataclass
class MultiTokenOutput(ModelOutput):  # type: ignore[misc]
    """Output of `MultiTokenLM.forward`; fields that were not asked for are None, and `out[0]` is the loss where there is one.

    Attributes:
        loss: scalar, sum over offsets of weight x mean nats over that offset's valid targets.
        logits: [B, T, V] of offset 1, the plain model's.
        loss_per_offset: detached mean nats per offset [N], whatever the objective; NaN where an offset's weight is 0.
        future_logits: [B, T, N, V]; index 0 is offset 1.
        past_key_values: the cache, where one was used.
        hidden_states: the base's own, where asked for.
        attentions: the base's own, where asked for.
        num_correct_per_offset: valid targets of each offset that no other token outscores, int64 [N]; a tie counts as correct.
        auxiliary_loss: detached nats of the auxiliary objective per next-token target, before its weight; in train mode only.
        objective_per_offset: like loss_per_offset, what is trained; only where heads are distilled.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_per_offset: Tensor | None = None
    future_logits: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    num_correct_per_offset: Tensor | None = None
    objective_per_offset: Tensor | None = None
    auxiliary_loss: Tensor | None = None


@dataclass(frozen=True)
class OffsetHiddenStates:
    """Hidden states of one pass through trunk and heads.

    Attributes:
        last_hidden_BTD: offset 1, after the final norm (the base's own decoder applies it).
        future_hidden: offsets 2..; item i is offset i + 2, as the head gives it (`MultiTokenLM.before_unembedding` applies
            the final norm where the heads use it).
        previous_tokens: per item of `future_hidden` the token just before the predicted one [B, T], -100 where there is
            none; None for heads that do without.
        register_hidden_BTD: of registers beside the row, after the final norm; None where there are none.
        head_inputs: what heads that draft in turn start from; None for others.
        past_key_values: the cache that the base used.
        hidden_states: the base's own, where asked for.
        attentions: the base's own, where asked for.
    """

    last_hidden_BTD: Tensor
    future_hidden: tuple[Tensor, ...]
    previous_tokens: tuple[Tensor, ...] | None = None
    register_hidden_BTD: Tensor | None = None
    head_inputs: HeadInputs | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        """Hidden states of every offset, from offset 1 on."""
        return (self.last_hidden_BTD, *self.future_hidden)

    @property
    def previous(self) -> tuple[Tensor | None, ...]:
        """Per offset, from offset 1 on, the tokens that `MultiTokenLM.offset_logits` wants; None where it wants none."""
        return (None, *(self.previous_tokens or (None,) * len(self.future_hidden)))
