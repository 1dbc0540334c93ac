"""The paper's own schedules: forward and backward head by head (Figures 2 and S11).

For comparison on one process. Peak memory holds one head's logits and activations at a time; under DDP and FSDP2 the
nested backward passes desynchronise gradients, so training uses `headway.losses.chunked` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headway.errors import ConfigError
from headway.functional.targets import shift_targets
from headway.heads.base import LayerCall
from headway.heads.transformer import TransformerHeads, run_head
from headway.losses.chunked import loss_of_targets
from headway.model.documents import isolating_mask
from headway.model.multi_token_lm import MultiTokenLM


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

    Equal to `model(input_ids, labels=labels).loss.backward()`: same value, same gradients added to `.grad`. Order, for
    n = 2: trunk forward, head 1 forward, head 1 backward, head 2 forward, head 2 backward, trunk backward. Where heads
    read each other: trunk and all heads forward, then loss by loss from the head farthest from the trunk, each adding what
    the later ones sent back, the trunk's backward last.

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
        ConfigError: heads for which the paper has no such schedule.

    Source: Gloeckle et al. 2024 (arXiv:2404.19737), section 2, Figure 2; appendix B, Figure S11.
    """
    family, num_future_tokens, heads = model.family, model.num_future_tokens, model.heads
    if not isinstance(heads, TransformerHeads) or heads.reading.layers_back or heads.markov is not None:
        raise ConfigError(
            f"the per-head schedule is for transformer heads on the trunk's output without a Markov bias: got "
            f"{model.mtp_config}; use model(input_ids, labels=labels).loss.backward()"
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

    def head_loss(hidden_BTD: Tensor, offset: int) -> Tensor:
        targets_BT = shift_targets(
            labels_BT,
            offset=offset,
            position_ids_BT=position_ids_BT,
            document_ids_BT=document_ids_BT,
            attention_mask_BT=attention_mask_BT,
        )
        return loss_of_targets(
            [hidden_BTD],
            family.lm_head.weight,
            targets_BT.view(1, -1),
            offset_weights=(weights[offset - 1],),
            soft_cap=family.soft_cap,
            chunk_tokens=model.mtp_config.loss_chunk_tokens,
        ).total

    arguments: dict[str, Any] = {
        "input_ids": input_ids_BT,
        "attention_mask": mask,
        "position_ids": position_ids_BT,
        "use_cache": False,
        **kwargs,
    }
    if heads.changes_base:
        links = _anticausal_links(model, heads, arguments)
    elif heads.reading.point == "final_residual":
        links = _causal_links(model, heads, arguments)
    else:
        return _backward_parallel(model, heads, arguments, head_loss)
    return _backward_chain(links, head_loss)


HeadLoss = Callable[[Tensor, int], Tensor]
"""(normed hidden states, offset) -> that offset's share of the loss."""


def _backward_parallel(
    model: MultiTokenLM, heads: TransformerHeads, arguments: dict[str, Any], head_loss: HeadLoss
) -> Tensor:
    with model._tap.armed(cut=True) as tap:
        hidden_BTD = model.family.decoder(**arguments)[0]
        call, leaf_BTD = tap.call, tap.leaf_BTD
    loss = head_loss(hidden_BTD, 1)
    loss.backward()  # type: ignore[no-untyped-call]
    total = loss.detach()
    del hidden_BTD, loss
    for offset, head in enumerate(heads, start=2):
        loss = head_loss(model.final_norm(run_head(call, head, leaf_BTD)), offset)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
        del loss
    if call.hidden_BTD.requires_grad and leaf_BTD.grad is not None:
        call.hidden_BTD.backward(leaf_BTD.grad)  # type: ignore[no-untyped-call]
    return total


@dataclass(frozen=True)
class _Link:
    """One head of a chain, cut from the one before it.

    Attributes:
        source_BTD: what the one before it (or the trunk) gave, with its graph.
        leaf_BTD: the same without, which the head read; its gradient is what the head sends back.
        output_BTD: what the next head reads.
        normed_BTD: what the unembedding reads.
        offset: of the head.
    """

    source_BTD: Tensor
    leaf_BTD: Tensor
    output_BTD: Tensor
    normed_BTD: Tensor
    offset: int


def _causal_links(model: MultiTokenLM, heads: TransformerHeads, arguments: dict[str, Any]) -> list[_Link]:
    with model._tap.armed(cut=True) as tap:
        hidden_BTD = model.family.decoder(**arguments)[0]
        call, leaf_BTD, residual_BTD = tap.call, tap.leaf_BTD, tap.reading(hidden_BTD)
    links = [_Link(call.hidden_BTD, leaf_BTD, residual_BTD, hidden_BTD, 1)]
    for offset, body in enumerate(heads, start=2):
        source_BTD = links[-1].output_BTD
        leaf_BTD = source_BTD.detach().requires_grad_()
        output_BTD = run_head(call, body, leaf_BTD)
        links.append(_Link(source_BTD, leaf_BTD, output_BTD, model.final_norm(output_BTD), offset))
    return links


def _anticausal_links(model: MultiTokenLM, heads: TransformerHeads, arguments: dict[str, Any]) -> list[_Link]:
    links: list[_Link] = []
    last: list[Tensor] = []

    def splice(call: LayerCall) -> tuple[Tensor, ...]:
        source_BTD = call.hidden_BTD
        for offset in range(heads.num_heads + 1, 1, -1):
            leaf_BTD = source_BTD.detach().requires_grad_()
            output_BTD = run_head(call, heads[offset - 2], leaf_BTD)
            links.append(_Link(source_BTD, leaf_BTD, output_BTD, output_BTD, offset))
            source_BTD = output_BTD
        last[:] = [source_BTD, source_BTD.detach().requires_grad_()]
        return (last[1],)

    with model._tap.armed(splice=splice):
        hidden_BTD = model.family.decoder(**arguments)[0]
    links = [replace(link, normed_BTD=model.final_norm(link.output_BTD)) for link in links]
    return [*links, _Link(last[0], last[1], hidden_BTD, hidden_BTD, 1)]


def _backward_chain(links: list[_Link], head_loss: HeadLoss) -> Tensor:
    total = links[0].source_BTD.new_zeros(())
    sent_back: Tensor | None = None
    for link in reversed(links):
        loss = head_loss(link.normed_BTD, link.offset)
        total = total + loss.detach()
        if sent_back is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward([loss, link.output_BTD], [None, sent_back])
        sent_back = link.leaf_BTD.grad
        del loss
    if links[0].source_BTD.requires_grad and sent_back is not None:
        links[0].source_BTD.backward(sent_back)  # type: ignore[no-untyped-call]
    return total
