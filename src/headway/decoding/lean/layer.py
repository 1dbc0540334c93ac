"""One decoder layer of the llama-like families: few fused products, the ragged cache, no module calls.

Legend: B rows, M positions of one forward, D width, H query heads, K key/value heads, G = H / K, d width of a head, r rotated
part of d, S visible slots.

    pre-norm (llama, mistral, qwen2, qwen3, phi3):   x = x + attention(norm(x)),   x = x + mlp(norm(x))
    post-norm (olmo2):                               x = x + norm(attention(x)),   x = x + norm(mlp(x))
    mlp(x) = down(act(gate(x)) * up(x))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.decoding.lean.integers import Quantizer
from headway.decoding.lean.linear import FusedLinear, Way, fastest_way
from headway.decoding.lean.passes import LeanPass
from headway.decoding.lean.stack import LayerStack, layer_weights, serves
from headway.functional.rotary import rotate


class RMSNorm:
    """x / rms(x) * weight, rounded as the family rounds it.

    Attributes:
        weight: [D], or one per head.
        eps: added to the mean square.
        weight_first: whether it multiplies before it rounds.
    """

    def __init__(self, module: Any, *, weight: Tensor | None = None) -> None:
        self.weight = module.weight.detach() if weight is None else weight
        self.eps = float(module.variance_epsilon)
        # olmo2 multiplies before it rounds.
        self.weight_first = type(module).__name__ == "Olmo2RMSNorm"

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.dtype == torch.float32 and self.weight.ndim == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight_first:
            return (self.weight * normed).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class LeanLayer:
    """The weights of one decoder layer, fused, and its forward.

    Attributes:
        window: tokens that a position sees, itself included; None for all.
        num_bytes: of the copies made for it.
        weights: what the C++ kernel reads of the layer; None where it does not serve it.
    """

    def __init__(
        self, layer: Any, *, window: int | None, way: Way | None = None, quantizer: Quantizer | None = None
    ) -> None:
        """Read a layer of an admitted family (`headway.decoding.lean.admission`).

        Args:
            layer: the family's module; its weights are not changed.
            window: tokens that a position sees, itself included; None for all.
            way: how products are made; None for the fastest.
            quantizer: for "int8".
        """
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        self._width = int(attention.head_dim)
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._groups = self._heads // self._kv_heads
        self._scale = float(attention.scaling)
        self.window = window
        way = fastest_way(attention.o_proj.weight) if way is None else way
        qkv = (
            [attention.qkv_proj] if hasattr(attention, "qkv_proj") else _three(attention, "q_proj", "k_proj", "v_proj")
        )
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        if way == "int8" and quantizer is None:
            quantizer = Quantizer()
        fused = partial(FusedLinear, way=way, quantizer=quantizer)
        self._qkv, self._out = fused(qkv), fused([attention.o_proj])
        self._gate_up, self._down = fused(gate_up), fused([mlp.down_proj])
        self.num_bytes = sum(map(_bytes, (self._qkv, self._out, self._gate_up, self._down)))
        self._act: Callable[[Tensor], Tensor] = getattr(mlp, "act_fn", None) or mlp.activation_fn
        self._post_norm = not hasattr(layer, "input_layernorm")
        if self._post_norm:
            self._attention_norm = RMSNorm(layer.post_attention_layernorm)
            self._mlp_norm = RMSNorm(layer.post_feedforward_layernorm)
        else:
            self._attention_norm = RMSNorm(layer.input_layernorm)
            self._mlp_norm = RMSNorm(layer.post_attention_layernorm)
        self.weights = layer_weights(layer, window=window, quantizer=quantizer) if way in ("kernel", "int8") else None
        self._stack = None if self.weights is None else LayerStack([self.weights])
        self._full_norms: tuple[RMSNorm, RMSNorm] | None = None
        self._head_norm: RMSNorm | None = None
        if hasattr(attention, "q_norm"):
            q_weight, k_weight = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            if q_weight.shape[0] == self._width and self._post_norm is False:
                both_Xd = torch.cat((q_weight.expand(self._heads, -1), k_weight.expand(self._kv_heads, -1)))
                self._head_norm = RMSNorm(attention.q_norm, weight=both_Xd)
            else:
                self._full_norms = (RMSNorm(attention.q_norm), RMSNorm(attention.k_norm))

    def __call__(self, hidden_BMD: Tensor, run: LeanPass, *, cache_index: int) -> Tensor:
        """The layer's output [B, M, D]; keys and values go to layer `cache_index` of the pass's cache."""
        if self._stack is not None and serves(hidden_BMD, run):
            states, _ = self._stack.run(hidden_BMD, run, cache_index=cache_index)
            return states[1]
        return self.by_torch(hidden_BMD, run, cache_index=cache_index)

    def by_torch(self, hidden_BMD: Tensor, run: LeanPass, *, cache_index: int) -> Tensor:
        """The same without the kernel for whole layers: its reference, and for what it does not serve."""
        if self._post_norm:
            hidden_BMD = hidden_BMD + self._attention_norm(self._attend(hidden_BMD, run, cache_index))
            return hidden_BMD + self._mlp_norm(self._feed_forward(hidden_BMD))
        hidden_BMD = hidden_BMD + self._attend(self._attention_norm(hidden_BMD), run, cache_index)
        return hidden_BMD + self._feed_forward(self._mlp_norm(hidden_BMD))

    def _feed_forward(self, x_BMD: Tensor) -> Tensor:
        gate_BMF, up_BMF = self._gate_up(x_BMD).chunk(2, dim=-1)
        return self._down(self._act(gate_BMF) * up_BMF)

    def _attend(self, x_BMD: Tensor, run: LeanPass, cache_index: int) -> Tensor:
        batch, positions, _ = x_BMD.shape
        qkv_BMX = self._qkv(x_BMD)
        rotated = self._heads + self._kv_heads
        if self._full_norms is not None:
            widths = [count * self._width for count in (self._heads, self._kv_heads, self._kv_heads)]
            q_BMX, k_BMX, v_BMX = torch.split(qkv_BMX, widths, dim=-1)
            qkv_BMX = torch.cat((self._full_norms[0](q_BMX), self._full_norms[1](k_BMX), v_BMX), dim=-1)
        qkv_BMXd = qkv_BMX.view(batch, positions, -1, self._width)
        qk_BMXd, v_BMKd = qkv_BMXd[:, :, :rotated], qkv_BMXd[:, :, rotated:]
        if self._head_norm is not None:
            qk_BMXd = self._head_norm(qk_BMXd)
        qk_BMXd = rotate(qk_BMXd, *run.cos_sin)
        q_BMHd = qk_BMXd[:, :, : self._heads]
        keys_BKSd, values_BKSd = qk_BMXd[:, :, self._heads :].transpose(1, 2), v_BMKd.transpose(1, 2)
        if run.cache is not None:
            keys_BKSd, values_BKSd = run.cache.update(keys_BKSd, values_BKSd, cache_index)
        if run.masks:
            mixed_BMX = self._attend_to_cache(q_BMHd, keys_BKSd, values_BKSd, run.mask(self.window))
        else:
            mixed_BMX = self._attend_causally(q_BMHd, keys_BKSd, values_BKSd)
        return self._out(mixed_BMX)

    def _attend_causally(self, q_BMHd: Tensor, keys_BKSd: Tensor, values_BKSd: Tensor) -> Tensor:
        """A pass from slot 0: position i sees slots up to i, `window` of them at most."""
        batch, positions = q_BMHd.shape[:2]
        mask = None
        if self.window is not None and positions > self.window:
            index_M = torch.arange(positions, device=q_BMHd.device)
            gap_MS = index_M[:, None] - index_M
            mask = (gap_MS >= 0) & (gap_MS < self.window)
        mixed_BHMd = F.scaled_dot_product_attention(
            q_BMHd.transpose(1, 2),
            keys_BKSd[:, :, :positions].repeat_interleave(self._groups, dim=1),
            values_BKSd[:, :, :positions].repeat_interleave(self._groups, dim=1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
        )
        return mixed_BHMd.transpose(1, 2).reshape(batch, positions, -1)

    def _attend_to_cache(
        self, q_BMHd: Tensor, keys_BKSd: Tensor, values_BKSd: Tensor, mask_B1MS: Tensor | None
    ) -> Tensor:
        """Query heads of a group read the same keys, so they stand in line as further positions: keys are read once."""
        batch, positions = q_BMHd.shape[:2]
        if self._groups == 1:
            mixed_BHMd = F.scaled_dot_product_attention(
                q_BMHd.transpose(1, 2), keys_BKSd, values_BKSd, attn_mask=mask_B1MS, scale=self._scale
            )
            return mixed_BHMd.transpose(1, 2).reshape(batch, positions, -1)
        shape = (batch, positions, self._kv_heads, self._groups, self._width)
        # [B, K, G * M, d]
        queries = q_BMHd.reshape(shape).permute(0, 2, 3, 1, 4).reshape(batch, self._kv_heads, -1, self._width)
        mask = None if mask_B1MS is None else mask_B1MS.repeat(1, 1, self._groups, 1)
        mixed = F.scaled_dot_product_attention(queries, keys_BKSd, values_BKSd, attn_mask=mask, scale=self._scale)
        mixed = mixed.view(batch, self._kv_heads, self._groups, positions, self._width)
        return mixed.permute(0, 3, 1, 2, 4).reshape(batch, positions, -1)


def _three(module: nn.Module, *names: str) -> list[nn.Linear]:
    return [getattr(module, name) for name in names]


def _bytes(linear: FusedLinear) -> int:
    return linear.num_bytes
