"""A plain Llama forward on Meta's layout: what a facebook folder means, without Hugging Face.

Legend: B batch, T positions, N future tokens, V vocabulary, D width, H heads, P pairs per head.

Used by `headway convert --verify` alone: it knows nothing of reordered rows, so that logits agree only if they were
reordered rightly. It is slow, and has one block in memory at a time.

Source: the released model.py of facebook/multi-token-prediction as recorded by two independent ports: the trunk is
layers[:-1]; [layers[-1], *extra_heads] all read its output and share norm and output matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from headway.convert.facebook.params import FacebookParams
from headway.convert.facebook.tensors import EXTRA_HEADS
from headway.convert.lazy_model import LazyTensor, WeightChange


def meta_logits(
    tensors: Mapping[str, LazyTensor],
    params: FacebookParams,
    tokens_BT: Tensor,
    *,
    change: WeightChange | None = None,
) -> Tensor:
    """Logits [B, T, N, V] in float32.

    Args:
        tensors: by Meta's names, whole.
        params: sizes.
        tokens_BT: token ids.
        change: applied to every weight, in float32, before it is used.
    """

    def weight(name: str) -> Tensor:
        values = tensors[name].read().float()
        return values if change is None else change(values)

    def normed(hidden_BTD: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden_BTD, (params.dim,), weight(name), eps=params.norm_eps)

    def block(hidden_BTD: Tensor, prefix: str) -> Tensor:
        hidden_BTD = hidden_BTD + _attention(
            normed(hidden_BTD, f"{prefix}.attention_norm.weight"),
            *(weight(f"{prefix}.attention.{name}.weight") for name in ("wq", "wk", "wv", "wo")),
            params=params,
        )
        inner_BTD = normed(hidden_BTD, f"{prefix}.ffn_norm.weight")
        w1, w2, w3 = (weight(f"{prefix}.feed_forward.{name}.weight") for name in ("w1", "w2", "w3"))
        return hidden_BTD + F.linear(F.silu(F.linear(inner_BTD, w1)) * F.linear(inner_BTD, w3), w2)

    with torch.no_grad():
        trunk_BTD = F.embedding(tokens_BT, weight("tok_embeddings.weight"))
        for index in range(params.base_layers - 1):
            trunk_BTD = block(trunk_BTD, f"layers.{index}")
        heads = [f"layers.{params.base_layers - 1}"]
        heads += [f"{EXTRA_HEADS}.{index}" for index in range(params.n_future_tokens - 1)]
        hidden_BTND = torch.stack([block(trunk_BTD, head) for head in heads], dim=2)
        return F.linear(normed(hidden_BTND, "norm.weight"), weight("output.weight"))


def _attention(hidden_BTD: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, *, params: FacebookParams) -> Tensor:
    batch, positions, _ = hidden_BTD.shape

    def heads(projection: Tensor, count: int) -> Tensor:
        return F.linear(hidden_BTD, projection).view(batch, positions, count, params.head_dim).transpose(1, 2)

    queries = _rotate(heads(wq, params.n_heads), params.rope_theta)
    keys = _rotate(heads(wk, params.n_kv_heads), params.rope_theta)
    values = heads(wv, params.n_kv_heads)
    share = params.n_heads // params.n_kv_heads
    mixed_BHTd = F.scaled_dot_product_attention(
        queries, keys.repeat_interleave(share, dim=1), values.repeat_interleave(share, dim=1), is_causal=True
    )
    return F.linear(mixed_BHTd.transpose(1, 2).reshape(batch, positions, -1), wo)


def _rotate(heads_BHTd: Tensor, theta: float) -> Tensor:
    *_, positions, width = heads_BHTd.shape
    frequencies_P = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles_TP = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies_P
    cosines_TP, sines_TP = angles_TP.cos(), angles_TP.sin()
    even, odd = heads_BHTd[..., 0::2], heads_BHTd[..., 1::2]
    rotated = (even * cosines_TP - odd * sines_TP, even * sines_TP + odd * cosines_TP)
    return torch.stack(rotated, dim=-1).flatten(-2)
