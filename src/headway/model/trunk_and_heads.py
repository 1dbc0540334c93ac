"""One pass through trunk and heads of a multi-token model, up to every offset's hidden states.

Legend: B batch, T positions, L layers of the base, n future tokens.

Masks and caches reach the family's own forward unchanged; a tap on its layers notes what the heads read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from headway.errors import ConfigError
from headway.functional.targets import shift_targets
from headway.heads.base import HeadInputs, SplicedHeads, TokenReadingHeads
from headway.model.documents import AttentionMask
from headway.model.families import check_shared_parts
from headway.model.head_cache import cache_for_heads
from headway.model.objective import cut_off, likeliest
from headway.model.output import OffsetHiddenStates
from headway.model.registers import Registers


def offset_hidden_states(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: AttentionMask = None,
    position_ids: Tensor | None = None,
    past_key_values: Any | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    num_offsets: int | None = None,
    document_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    on_drafts: bool = False,
    registers: Registers | None = None,
    **kwargs: Any,
) -> OffsetHiddenStates:
    """One pass through trunk and heads, without unembedding; masks and caches reach the family's forward unchanged.

    Args:
        model: a `MultiTokenLM`.
        input_ids: tokens [B, T].
        attention_mask: as the family's own forward takes it.
        position_ids: positions [B, T].
        past_key_values: a cache with room for L + n - 1 layers where heads run.
        inputs_embeds: embeddings instead of tokens.
        use_cache: as the family's own forward takes it.
        num_offsets: heads beyond this offset are not run; None runs all.
        document_ids: for heads that read the tokens after a position: of its own document only.
        padding_mask: the same for padding, where `attention_mask` is not [B, T] itself.
        on_drafts: heads that read tokens read their own drafts (`TrainingObjective.train_on_drafts`).
        registers: run the row with these beside it (`headway.model.registers`).
        kwargs: for the base's own forward.

    Raises:
        ConfigError: a cache that the heads cannot use, or embeddings instead of tokens for heads that read tokens.
    """
    heads = model.heads
    check_shared_parts(model.base, model.family)
    wanted = model.num_future_tokens if num_offsets is None else num_offsets
    if wanted > 1 and heads.autoregressive and input_ids is None:
        raise ConfigError(
            f"{model.mtp_config.heads} heads read the tokens before an offset, which inputs_embeds does not tell; pass "
            f"input_ids"
        )
    if wanted > 1 or heads.changes_base:
        past_key_values = cache_for_heads(
            past_key_values,
            heads,
            num_heads=model.num_future_tokens - 1,
            base_layers=len(model.family.layers),
            architecture=model.mtp_config.heads,
            build=(model.config.use_cache if use_cache is None else use_cache)
            and not (model.training and model.is_activation_checkpointing),
        )
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    } | ({} if registers is None else registers.arguments)
    if padding_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        padding_mask = attention_mask

    def following(ahead: int) -> Tensor:
        assert input_ids is not None
        return shift_targets(
            input_ids,
            offset=ahead,
            position_ids_BT=position_ids,
            document_ids_BT=document_ids,
            attention_mask_BT=padding_mask,
        )

    with model._tap.armed(splice=heads.splice if isinstance(heads, SplicedHeads) and heads.num_heads else None) as tap:
        decoder_output = model.family.decoder(**arguments, **kwargs)
        last_hidden_BTD, register_hidden_BTD = decoder_output[0], None
        inputs = HeadInputs(
            hidden_BTD=tap.reading(last_hidden_BTD),
            call=tap.call,
            embed=model.get_input_embeddings(),
            following=following,
            spliced=tap.spliced,
        )
    if registers is not None:
        last_hidden_BTD, register_hidden_BTD = registers.split(last_hidden_BTD)
        inputs = registers.without(inputs, model.family.last_layer)
    if model.objective.detach_trunk != "off":
        inputs = cut_off(inputs)
    future: tuple[Tensor, ...] = ()
    if wanted > 1:
        # A growing cache cannot take back what heads compute from tokens that are not there yet.
        teacher = heads.reads_tokens and (past_key_values is None or isinstance(past_key_values, DynamicCache))
        readable = replace(inputs, call=inputs.call.without_cache()) if teacher else inputs
        if on_drafts and isinstance(heads, TokenReadingHeads):
            future = heads.drafted_hidden(readable, num_heads=wanted - 1, choose=partial(likeliest, model))
        else:
            future = heads.future_hidden(readable, num_heads=wanted - 1)
    return OffsetHiddenStates(
        last_hidden_BTD=last_hidden_BTD,
        future_hidden=future,
        register_hidden_BTD=register_hidden_BTD,
        previous_tokens=tuple(following(ahead) for ahead in range(1, wanted)) if heads.autoregressive else None,
        head_inputs=inputs if heads.autoregressive else None,
        past_key_values=getattr(decoder_output, "past_key_values", None),
        hidden_states=getattr(decoder_output, "hidden_states", None),
        attentions=getattr(decoder_output, "attentions", None),
    )
