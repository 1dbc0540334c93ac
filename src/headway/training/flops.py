"""How many floating-point operations a token of training takes, counted on the real modules.

Legend: T positions, D width, V vocabulary, N future tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from headway.heads.auxiliary import RegisterTokens, TokenOrderHead
from headway.model.memory import cache_footprint, model_footprint
from headway.model.multi_token_lm import MultiTokenLM

_FORWARD_AND_BACKWARD = 3  # the backward pass multiplies by the weight and by the input: twice the forward
_POSITIONS = 8
_WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def training_flops_per_token(model: MultiTokenLM, *, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one input token; a multiply-add is two.

    Equal to `6 x weights` of every matrix that a token is multiplied by, as often as it is (layers, heads, and one
    unembedding for each of the N offsets; embeddings are looked up and count nothing), plus `12 x width x context` of
    every attention layer, where the context is the mean number of positions that a causal row of T sees, (T + 1) / 2.
    What a recipe computes twice to save memory is not counted, nor are norms, softmax, optimizer, or the pairs that
    document boundaries in a row save: it is what the model takes, not what a machine did.

    Args:
        model: on any device; weights on the meta device do, and become fake ones.
        sequence_length: T.

    Source: the count of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B, with attention halved because it is
    causal, heads and their unembeddings counted.
    """
    body, base = _weight_products(model)
    unembeddings = sum(2 * model.unembedding(offset).weight.numel() for offset in range(1, model.num_future_tokens + 1))
    if model.heads.markov is not None:
        unembeddings += 2 * (model.num_future_tokens - 1) * model.heads.markov.to_logits.weight.numel()
    attention = _attention(model, sequence_length)
    if isinstance(model.heads.auxiliary, TokenOrderHead):
        unembeddings += 2 * model.heads.auxiliary.to_scores.weight.numel()
    elif isinstance(model.heads.auxiliary, RegisterTokens):
        # A register for every token goes through the base and the unembedding, and sees what its token sees.
        body += base
        unembeddings += 2 * model.unembedding(1).weight.numel()
        attention += _attention(model, sequence_length, of_base=True)
    return _FORWARD_AND_BACKWARD * (body + unembeddings + attention)


def mean_context(sequence_length: int, *, window: int | None = None) -> float:
    """Positions that a position of a causal row sees on average, itself included.

    >>> mean_context(4), mean_context(4, window=2)
    (2.5, 1.75)
    """
    seen = sequence_length if window is None else min(window, sequence_length)
    return (seen * (seen + 1) / 2 + (sequence_length - seen) * seen) / sequence_length


def _weight_products(model: MultiTokenLM) -> tuple[int, int]:
    """Operations of the products with weights in a forward of one token, unembeddings apart: of all, and of the base."""
    # allow_non_fake_inputs: constants that a family's rotary embedding holds are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.to_empty(device="cpu")
        return _products(model, num_offsets=model.num_future_tokens), _products(model, num_offsets=1)


def _products(model: MultiTokenLM, *, num_offsets: int) -> int:
    input_ids_1T = torch.zeros((1, _POSITIONS), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        states = model.offset_hidden_states(input_ids_1T, use_cache=False, num_offsets=num_offsets)
        for offset, hidden_BTD in enumerate(states.hidden, start=1):
            model.before_unembedding(hidden_BTD, offset=offset)
    total = counter.get_flop_counts().get("Global", {})
    return sum(int(count) for operation, count in total.items() if operation in _WEIGHT_PRODUCTS) // _POSITIONS


def _attention(model: MultiTokenLM, sequence_length: int, *, of_base: bool = False) -> int:
    """Operations of scores and values of one token in all layers, or in the base's, forward."""
    config: Any = model.base.config
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    cache = model_footprint(model, dtype=torch.float32).cache
    if of_base:
        cache = cache_footprint(config, 1, dtype=torch.float32)
    whole = (cache.layers - cache.sliding_layers) * mean_context(sequence_length)
    sliding = cache.sliding_layers * mean_context(sequence_length, window=cache.sliding_window)
    return round(4 * width * (whole + sliding))
