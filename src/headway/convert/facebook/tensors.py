"""Tensors of Meta's Llama layout and those of the Hugging Face model that they are.

Legend: H heads, P pairs per head (half a head's width), D model width.

Both rotate pairs of a head's components by the same angles. Meta's pairs are neighbours (2i, 2i+1), Hugging Face's lie
half a head apart (i, i + P): the rows of the query and key projections are reordered, nothing else changes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from headway.convert.facebook.params import FacebookParams
from headway.convert.lazy_model import LazyTensor

EXTRA_HEADS = "extra_heads"

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_OUTSIDE_BACK = {own: meta for meta, own in _OUTSIDE.items()}
_INSIDE_BACK = {own: meta for meta, own in _INSIDE.items()}


def meta_name_of_base(name: str) -> str:
    """Meta's name of a tensor in the state dict of a llama base.

    >>> meta_name_of_base("model.layers.3.self_attn.q_proj.weight")
    'layers.3.attention.wq.weight'

    Raises:
        KeyError: not a tensor of the layout.
    """
    if name in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    return f"layers.{match[1]}.{_INSIDE_BACK[match[2]]}"


def meta_name_of_head(name: str) -> str:
    """Meta's name of a tensor in the state dict of the heads; head 0 predicts offset 2 in both.

    >>> meta_name_of_head("0.mlp.up_proj.weight")
    'extra_heads.0.feed_forward.w3.weight'
    """
    index, _, inside = name.partition(".")
    return f"{EXTRA_HEADS}.{index}.{_INSIDE_BACK[inside]}"


def from_meta(name: str, tensor: LazyTensor, params: FacebookParams) -> LazyTensor:
    """The tensor in Hugging Face's order, given Meta's name of it."""
    heads = rotated_heads(name, params)
    return tensor if heads is None else replace(tensor, read=lambda: to_half_split(tensor.read(), num_heads=heads))


def to_meta(name: str, tensor: LazyTensor, params: FacebookParams) -> LazyTensor:
    """The inverse of `from_meta`; `name` is Meta's."""
    heads = rotated_heads(name, params)
    return tensor if heads is None else replace(tensor, read=lambda: to_interleaved(tensor.read(), num_heads=heads))


def rotated_heads(name: str, params: FacebookParams) -> int | None:
    """Heads of a projection whose rows the rotary embedding pairs; None for every other tensor."""
    if name.endswith("attention.wq.weight"):
        return params.n_heads
    return params.n_kv_heads if name.endswith("attention.wk.weight") else None


def to_half_split(weight_OD: Tensor, *, num_heads: int) -> Tensor:
    """Rows (2i, 2i+1) of each head to (i, i + P).

    >>> import torch
    >>> to_half_split(torch.tensor([[0], [1], [2], [3]]), num_heads=1).flatten().tolist()
    [0, 2, 1, 3]
    """
    rows, width = weight_OD.shape
    weight_HP2D = weight_OD.reshape(num_heads, rows // num_heads // 2, 2, width)
    return weight_HP2D.transpose(1, 2).reshape(rows, width)


def to_interleaved(weight_OD: Tensor, *, num_heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    rows, width = weight_OD.shape
    weight_H2PD = weight_OD.reshape(num_heads, 2, rows // num_heads // 2, width)
    return weight_H2PD.transpose(1, 2).reshape(rows, width)
