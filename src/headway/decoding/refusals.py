"""Requests that the engine does not serve, each refused by name and with the way out.

Whatever transformers would understand but this engine would silently do differently is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from headway.errors import DecodingError

_ELSEWHERE = "use model.base.generate(...) for it"


def _set(value: Any) -> bool:
    return value is not None and value is not False


def _more_than_one(value: Any) -> bool:
    return value is not None and value > 1


# option -> (what it asks for, whether a value really asks for it)
_OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_beams": ("beam search", _more_than_one),
    "num_beam_groups": ("diverse beam search", _more_than_one),
    "constraints": ("constrained beam search", _set),
    "force_words_ids": ("constrained beam search", _set),
    "penalty_alpha": ("contrastive search", lambda value: value is not None and value > 0),
    "dola_layers": ("DoLa decoding", _set),
    "prompt_lookup_num_tokens": ("assisted decoding by prompt lookup", _set),
    "assistant_early_exit": ("assisted decoding by early exit", _set),
    "use_mtp": ("transformers' own multi-token prediction", _set),
    "guidance_scale": ("classifier-free guidance", lambda value: value is not None and value != 1),
    "output_attentions": ("attention weights", _set),
    "output_hidden_states": ("hidden states", _set),
    "cache_implementation": ("another kind of cache", lambda value: value not in (None, "hybrid", "dynamic")),
    "prefill_chunk_size": ("a prefill in chunks (here prefill_chunk_tokens=...)", _set),
    "token_healing": ("token healing", _set),
}

# keyword arguments of `generate` itself, never options of a configuration
_ARGUMENTS: dict[str, str] = {
    "assistant_model": "assisted decoding",
    "custom_generate": "a custom decoding loop",
    "inputs_embeds": "a prompt given as embeddings",
    "past_key_values": "a cache made elsewhere",
    "position_ids": "positions other than 0, 1, 2, ... of each row's tokens",
    "negative_prompt_ids": "classifier-free guidance",
    "negative_prompt_attention_mask": "classifier-free guidance",
    "synced_gpus": "generation in step with other processes",
}

# handed on by transformers' generate, with nothing in them that this engine needs
_HARMLESS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict", "tokenizer"}
)


def resolve_option(name: str, arguments: Mapping[str, Any], model: Any) -> Any:
    """The value that transformers will use: the call's, else the given configuration's, else the model's."""
    if name in arguments:
        return arguments[name]
    for config in (arguments.get("generation_config"), model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def check_request(arguments: Mapping[str, Any], model: Any) -> None:
    """Refuse what the engine does not serve.

    Raises:
        DecodingError: names the option and the way out.
    """
    for name, what in _ARGUMENTS.items():
        if _set(arguments.get(name)):
            raise DecodingError(f"{name} asks for {what}, which self-speculative decoding does not serve; {_ELSEWHERE}")
    _check_options(lambda name: resolve_option(name, arguments, model))
    implementation = getattr(model.config, "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager"):
        raise DecodingError(
            f"decoding needs attn_implementation 'sdpa' or 'eager', which take a mask per position: got "
            f"{implementation!r}; call model.base.set_attn_implementation('sdpa') first"
        )


def check_prepared(generation_config: Any, *, synced_gpus: bool) -> None:
    """The same for a configuration that transformers has merged already, whichever way the loop was reached.

    Raises:
        DecodingError: names the option and the way out.
    """
    _check_options(lambda name: getattr(generation_config, name, None))
    if synced_gpus:
        raise DecodingError(f"synced_gpus asks for {_ARGUMENTS['synced_gpus']}, which is not served; {_ELSEWHERE}")


def _check_options(value_of: Callable[[str], Any]) -> None:
    for name, (what, asked) in _OPTIONS.items():
        value = value_of(name)
        if asked(value):
            raise DecodingError(
                f"{name}={value!r} asks for {what}, which self-speculative decoding does not serve; {_ELSEWHERE}"
            )
    returned = value_of("num_return_sequences")
    if _more_than_one(returned) and not value_of("do_sample"):
        raise DecodingError(
            f"num_return_sequences={returned} needs do_sample=True: greedy decoding has one result per prompt"
        )


def check_leftovers(model_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of the model's forward that the loop would not pass on.

    Raises:
        DecodingError: names them.
    """
    ignored = sorted(name for name, value in model_kwargs.items() if name not in _HARMLESS and _set(value))
    if ignored:
        names = ", ".join(ignored)
        raise DecodingError(f"generate does not pass {names} on to the model; leave it out, or {_ELSEWHERE}")


def resolve_num_draft_tokens(num_draft_tokens: int | str | None, *, num_future_tokens: int) -> int:
    """K: the heads' number unless the caller asks for less; with "auto" the most that the controller can choose.

    Raises:
        DecodingError: negative, or more than there are heads.
    """
    heads = num_future_tokens - 1
    if num_draft_tokens is None or num_draft_tokens == "auto":
        return heads
    if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int):
        raise DecodingError(
            f"num_draft_tokens must be a whole number in 0..{heads} or 'auto': got {num_draft_tokens!r}"
        )
    if not 0 <= num_draft_tokens <= heads:
        raise DecodingError(
            f"num_draft_tokens must be in 0..{heads} (num_future_tokens - 1): got {num_draft_tokens}; 0 decodes one "
            f"token per forward, leave it out for the longest draft"
        )
    return num_draft_tokens


def check_new_tokens(arguments: Mapping[str, Any], model: Any, columns: int) -> None:
    """Refuse a limit that leaves no room for a new token.

    Args:
        arguments: of `generate`.
        model: for its generation configuration.
        columns: width of the prompt, padding included, which transformers counts into `max_length`.

    Raises:
        DecodingError: names the limit.
    """
    new = resolve_option("max_new_tokens", arguments, model)
    if new is not None:
        if new < 1:
            raise DecodingError(f"max_new_tokens must be at least 1: got {new}; pass how many tokens to generate")
        return
    total = resolve_option("max_length", arguments, model)
    if total is not None and total <= columns:
        raise DecodingError(
            f"max_length={total} leaves no room after a prompt of {columns} tokens; pass max_new_tokens instead, or "
            f"max_length above {columns}"
        )


def check_positions(config: Any, lengths: list[int], max_new_tokens: int) -> None:
    """Refuse lengths that the model has no positions for, or at which its rotary frequencies change underway.

    Args:
        config: of the base.
        lengths: tokens of each prompt.
        max_new_tokens: the most tokens a row can get.

    Raises:
        DecodingError: names the limit and what fits.
    """
    longest = max(lengths)
    # The last new token is never fed back.
    needed = longest + max_new_tokens - 1
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        limit = int(config.max_position_embeddings)
        if longest > limit:
            raise DecodingError(
                f"a prompt of {longest} tokens is longer than the {limit} positions that this {config.model_type} "
                f"model has; shorten it"
            )
        if needed > limit:
            raise DecodingError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need {needed} positions, this "
                f"{config.model_type} model has {limit}; pass max_new_tokens={limit - longest + 1} or less, or "
                f"shorten the prompt"
            )
        return
    for parameters in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        kind = parameters.get("rope_type", "default")
        if kind == "dynamic":
            limit = int(config.max_position_embeddings)
            changes = needed > limit
        elif kind == "longrope":
            limit = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
            changes = needed > limit >= min(lengths)
        else:
            continue
        if changes:
            raise DecodingError(
                f"rope_type {kind!r} changes its frequencies at {limit} tokens, and prompts of {min(lengths)} to "
                f"{longest} tokens with max_new_tokens={max_new_tokens} cross that, where a block of several tokens "
                f"cannot equal one token at a time; stay within {limit} tokens in all, or {_ELSEWHERE}"
            )


def check_streamer(streamer: Any, input_ids: Tensor | None) -> None:
    """Refuse a streamer for several rows, whose tokens it could not tell apart.

    Raises:
        DecodingError: more than one row.
    """
    if streamer is not None and input_ids is not None and input_ids.ndim == 2 and input_ids.shape[0] != 1:
        raise DecodingError(
            f"a streamer takes one prompt at a time: got {input_ids.shape[0]} rows; pass one row per call, or use "
            f"headway.decoding.blocks.stream_blocks for batches"
        )
