"""The paper's own schedules: forward and backward head by head (Figures 2 and S11).

For comparison on one process. Peak memory holds one head's logits and activations at a time; under DDP and FSDP2 the
nested backward passes desynchronise gradients, so training uses `headway.losses.chunked` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.errors import ConfigError
from headway.functional.targets import shift_targets
from headway.heads.base import ChainedHeads, HeadInputs, LayerCall, ParallelHeads
from headway.heads.transformer import AnticausalTransformerHeads, run_head
from headway.losses.chunked import LowRankBias, loss_of_targets
from headway.losses.objective import TrainingObjective
from headway.model.documents import isolating_mask
from headway.model.multi_token_lm import MultiTokenLM
from headway.model.tap import Cut


def backward_per_head(
    model: MultiTokenLM,
    input_ids_BT: Tensor,
    labels_BT: Tensor,
    *,
    attention_mask_BT: Tensor | None = None,
    position_ids_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Accumulate the gradients of the multi-token loss one head after the other.

    Equal to `model(input_ids, labels=labels).loss.backward()`: same value, same gradients added to `.grad`. Order where
    heads do not read each other, for n = 2: trunk forward, head 1 forward, head 1 backward, head 2 forward, head 2
    backward, trunk backward; the trunk is what lies before the place where the heads read. Where heads read each other:
    trunk and all heads forward, then loss by loss from the head farthest from the trunk, each adding what the later ones
    sent back, the trunk's backward last.

    Args:
        model: the multi-token model, not wrapped by DDP or FSDP.
        input_ids_BT: tokens.
        labels_BT: unshifted token ids; -100 is ignored.
        attention_mask_BT: 1 for tokens, 0 for padding.
        position_ids_BT: positions within each document.
        document_ids_BT: ids that differ between neighbouring documents.
        kwargs: for the base's own forward.

    Returns:
        The loss, detached.

    Raises:
        ValueError: labels or ids of a wrong shape.
        DataError: a label outside the vocabulary.
        ConfigError: packed documents with an attention implementation that takes no mask per token pair; an objective
            that is not the paper's.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2, Figure 2; appendix B, Figure S11.
    """
    family, num_future_tokens, heads = model.family, model.num_future_tokens, model.heads
    if model.objective != TrainingObjective() or heads.auxiliary is not None:
        raise ConfigError(
            f"the head-by-head schedule is that of the paper's own loss: got {model.objective} and auxiliary="
            f"{model.mtp_config.auxiliary!r}; use model(input_ids, labels=labels).loss.backward()"
        )
    mask = isolating_mask(
        model.config,
        shape=(input_ids_BT.shape[0], input_ids_BT.shape[1]),
        dtype=family.lm_head.weight.dtype,
        device=input_ids_BT.device,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
    )
    weights = model.mtp_config.offset_weights or (1.0,) * num_future_tokens

    def following(ahead: int, ids_BT: Tensor = input_ids_BT) -> Tensor:
        return shift_targets(
            ids_BT,
            offset=ahead,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            attention_mask_BT=attention_mask_BT,
        )

    def head_loss(hidden_BTD: Tensor, offset: int) -> Tensor:
        if not weights[offset - 1]:
            return hidden_BTD.new_zeros((), requires_grad=True)
        markov = None if offset == 1 else heads.markov
        bias = None if markov is None else LowRankBias(markov.states(following(offset - 1)), markov.to_logits.weight)
        return loss_of_targets(
            [model.before_unembedding(hidden_BTD, offset=offset)],
            model.unembedding(offset).weight,
            following(offset, labels_BT).view(1, -1),
            offset_weights=(weights[offset - 1],),
            soft_cap=family.soft_cap,
            chunk_tokens=model.mtp_config.loss_chunk_tokens,
            biases=[bias],
        ).total

    arguments: dict[str, Any] = {
        "input_ids": input_ids_BT,
        "attention_mask": mask,
        "position_ids": position_ids_BT,
        "use_cache": False,
        **kwargs,
    }
    if isinstance(heads, AnticausalTransformerHeads) and heads.num_heads:
        return _backward_chain(_spliced_links(model, heads, arguments), head_loss)
    with model._tap.armed(cut=True) as tap:
        hidden_BTD = family.decoder(**arguments)[0]
        cuts = tap.cuts
        if not cuts:  # heads read the base's own output
            cuts = [Cut.at(hidden_BTD)]
            hidden_BTD = cuts[0].leaf_BTD
        # Heads read a leaf of their own, since what they read may have been made from several places.
        cuts = [Cut.at(tap.reading(hidden_BTD)), *cuts]
        inputs = HeadInputs(
            hidden_BTD=cuts[0].leaf_BTD, call=tap.call, embed=model.get_input_embeddings(), following=following
        )
    if isinstance(heads, ChainedHeads) and heads.num_heads:
        total = _backward_chain(_chained_links(heads, inputs), head_loss)
        total = total + _backward(head_loss(hidden_BTD, 1))
    else:
        total = _backward(head_loss(hidden_BTD, 1))
    if isinstance(heads, ParallelHeads):
        for offset in range(2, num_future_tokens + 1):
            total = total + _backward(head_loss(heads.head(inputs, offset), offset))
    for cut in cuts:
        cut.send_back()
    return total


HeadLoss = Callable[[Tensor, int], Tensor]
"""(hidden states as the head gives them, offset) -> that offset's share of the loss."""


def _backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@dataclass(frozen=True)
class _Link:
    """One head of a chain, cut from what it reads.

    Attributes:
        cut: between the one before it (or the trunk) and this head.
        output_BTD: what the next head and this head's loss read.
        offset: of the head.
    """

    cut: Cut
    output_BTD: Tensor
    offset: int


def _chained_links(heads: ChainedHeads, inputs: HeadInputs) -> list[_Link]:
    links: list[_Link] = []
    source_BTD = heads.start(inputs)
    for offset in range(2, heads.num_heads + 2):
        cut = Cut.at(source_BTD)
        source_BTD = heads.link(inputs, offset, cut.leaf_BTD)
        links.append(_Link(cut, source_BTD, offset))
    return links


def _spliced_links(model: MultiTokenLM, heads: AnticausalTransformerHeads, arguments: dict[str, Any]) -> list[_Link]:
    links: list[_Link] = []
    last: list[Cut] = []

    def splice(call: LayerCall) -> tuple[Tensor, ...]:
        source_BTD = call.hidden_BTD
        for offset in range(heads.num_heads + 1, 1, -1):
            cut = Cut.at(source_BTD)
            source_BTD = run_head(call, heads[offset - 2], cut.leaf_BTD)
            links.append(_Link(cut, source_BTD, offset))
        last.append(Cut.at(source_BTD))
        return (last[0].leaf_BTD,)

    with model._tap.armed(splice=splice):
        hidden_BTD = model.family.decoder(**arguments)[0]
    return [*links, _Link(last[0], hidden_BTD, 1)]


def _backward_chain(links: list[_Link], head_loss: HeadLoss) -> Tensor:
    """Backward of the losses of a chain from its end to its beginning, and of what lies before it."""
    total: Tensor | float = 0.0
    sent_back: Tensor | None = None
    for link in reversed(links):
        loss = head_loss(link.output_BTD, link.offset)
        total = total + loss.detach()
        if sent_back is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward([loss, link.output_BTD], [None, sent_back])
        sent_back = link.cut.leaf_BTD.grad
        del loss
    links[0].cut.send_back()
    assert isinstance(total, Tensor)
    return total
