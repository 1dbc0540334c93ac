"""Decoder layers by one call of our C++ kernel: a small model's step costs arithmetic, not calls.

Legend: B rows, M positions of one forward, D width, L layers, S visible slots, r rotated width of a head.

The torch block (`headway.decoding.lean.layer`) is the reference and serves everything that the kernel does not: prompts, many
rows, norms after the sublayers (olmo2), norms over all heads together, and activations other than silu.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from headway.decoding.lean.few_rows import MatrixFields
from headway.decoding.lean.integers import IntegerWeight, Quantizer
from headway.decoding.lean.native import library
from headway.decoding.lean.passes import LeanPass
from headway.decoding.masks import ChainMasks

MOST_ROWS = 32
"""B x M up to which the kernel runs the layers; beyond it, large matrix products pay."""


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, MatrixFields) for name in ("q", "k", "v", "out", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("view", ctypes.c_int64),
    ]


class _View(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("mask_batch_stride", "mask_row_stride", "start", "length", "chain", "window")
        ),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "positions", "width", "heads", "kv_heads", "head_width", "rotated", "inner")
        ),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("views", "stores")),
        *((name, ctypes.c_int64) for name in ("batch_stride", "head_stride")),
        *(
            (name, ctypes.c_void_p)
            for name in ("slots", "position_ids", "cos", "sin", "states", "final_norm", "normed")
        ),
        ("threads", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class LayerWeights:
    """One layer as the kernel reads it.

    Attributes:
        shape: heads, key/value heads, width of a head, inner width: the same for all layers of a stack.
        eps: of its norms.
        scale: of its attention scores.
        window: tokens that a position sees, itself included; None for all.
        matrices: weight and bias of q, k, v, out, gate, up, down.
        norms: weights before attention and mlp, and of the heads of q and k where they have any.
    """

    shape: tuple[int, int, int, int]
    eps: float
    scale: float
    window: int | None
    matrices: tuple[tuple[Tensor | IntegerWeight, Tensor | None], ...]
    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def layer_weights(layer: Any, *, window: int | None, quantizer: Quantizer | None = None) -> LayerWeights | None:
    """A family's layer for the kernel; None where the kernel has no such layer, or there is no kernel.

    Args:
        layer: the family's module.
        window: tokens that a position sees, itself included; None for all.
        quantizer: rounds the weights; None leaves them as they are.
    """
    attention, mlp = layer.self_attn, layer.mlp
    config, width = attention.config, int(attention.head_dim)
    first = attention.o_proj.weight
    act = getattr(mlp, "act_fn", None) or mlp.activation_fn
    if not hasattr(layer, "input_layernorm") or not isinstance(act, nn.SiLU | SiLUActivation):
        return None
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.bfloat16) or library() is None:
        return None
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if q_norm is not None and q_norm.weight.shape[0] != width:
        return None
    norms = [norm for norm in (layer.input_layernorm, layer.post_attention_layernorm, q_norm, k_norm) if norm]
    epsilons = {float(norm.variance_epsilon) for norm in norms}
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if hasattr(attention, "qkv_proj"):
        qkv = _split(attention.qkv_proj, [heads * width, kv_heads * width, kv_heads * width], quantizer)
    else:
        qkv = [_whole(linear, quantizer) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    if hasattr(mlp, "gate_up_proj"):
        gate_up = _split(mlp.gate_up_proj, [mlp.gate_up_proj.out_features // 2] * 2, quantizer)
    else:
        gate_up = [_whole(linear, quantizer) for linear in (mlp.gate_proj, mlp.up_proj)]
    matrices = (*qkv, _whole(attention.o_proj, quantizer), *gate_up, _whole(mlp.down_proj, quantizer))
    tensors = [tensor for pair in matrices for tensor in pair if isinstance(tensor, Tensor)]
    tensors += [norm.weight for norm in norms]
    if len(epsilons) > 1 or any(not t.is_contiguous() or t.dtype != first.dtype for t in tensors):
        return None
    return LayerWeights(
        (heads, kv_heads, width, mlp.down_proj.in_features),
        epsilons.pop(),
        float(attention.scaling),
        window,
        matrices,
        tuple(None if norm is None else norm.weight.detach() for norm in (*norms[:2], q_norm, k_norm)),  # type: ignore[arg-type]
    )


class LayerStack:
    """Layers that follow each other, run in one call."""

    def __init__(self, layers: Sequence[LayerWeights], *, final_norm: Any = None) -> None:
        """Point at the weights of some layers.

        Args:
            layers: of one shape; their weights are kept alive and not copied.
            final_norm: an `RMSNorm` after the last of them, where its output is wanted too.
        """
        first = layers[0]
        self._weights = layers  # kept alive: the kernel has only their addresses
        self._windows = sorted({layer.window for layer in layers}, key=lambda window: (window is not None, window))
        self._layers = (_Layer * len(layers))()
        for entry, layer in zip(self._layers, layers, strict=True):
            names = ("q", "k", "v", "out", "gate", "up", "down")
            for name, (weight, bias) in zip(names, layer.matrices, strict=True):
                setattr(entry, name, MatrixFields.of(weight, bias))
            for place, norm in zip(("attention_norm", "mlp_norm", "q_norm", "k_norm"), layer.norms, strict=True):
                setattr(entry, place, _address(norm))
            entry.view = self._windows.index(layer.window)
        found = library()
        assert found is not None
        self.dtype = first.norms[0].dtype
        self._function = found.headway_layers_float32 if self.dtype == torch.float32 else found.headway_layers_bfloat16
        self._width = first.norms[0].shape[0]
        heads, kv_heads, head_width, inner = first.shape
        self._kv_shape = kv_heads, head_width
        self._pass = _Pass(width=self._width, heads=heads, kv_heads=kv_heads, head_width=head_width, inner=inner)
        self._pass.eps, self._pass.scale = first.eps, first.scale
        self._final_norm = final_norm

    def run(
        self,
        hidden_BMD: Tensor,
        run: LeanPass,
        *,
        first: int = 0,
        count: int | None = None,
        cache_index: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run layers on a block.

        Args:
            hidden_BMD: what the first of them gets.
            run: a `LeanPass` that `serves` allows.
            first: of the stack's layers.
            count: of layers; None for all that follow.
            cache_index: layer of the cache that the first of them writes; None for `first`.

        Returns:
            [count + 1, B, M, D]: the input and what each layer gives; and the last of them after the final norm, where
            the stack has one and its last layer ran.
        """
        batch, positions, width = hidden_BMD.shape
        count = len(self._layers) - first if count is None else count
        states = hidden_BMD.new_empty(count + 1, batch, positions, width)
        states[0] = hidden_BMD
        ends = self._final_norm is not None and first + count == len(self._layers)
        normed = torch.empty_like(hidden_BMD) if ends else None
        slots_BM, position_ids_BM = run.places(batch)
        call = _Pass.from_buffer_copy(self._pass)
        call.batch, call.positions = batch, positions
        call.slots, call.position_ids = slots_BM.data_ptr(), position_ids_BM.data_ptr()
        cos_Cr, sin_Cr = run.rotary
        call.cos, call.sin, call.rotated = cos_Cr.data_ptr(), sin_Cr.data_ptr(), cos_Cr.shape[1]
        call.states, call.threads = states.data_ptr(), torch.get_num_threads()
        if normed is not None:
            call.final_norm, call.normed = self._final_norm.weight.data_ptr(), normed.data_ptr()
        begin = first if cache_index is None else cache_index
        stored = run.cache.layers[begin : begin + count]
        for layer in stored:
            if not layer.is_initialized:
                empty = hidden_BMD.new_empty(batch, self._kv_shape[0], 0, self._kv_shape[1])
                layer.lazy_initialization(empty, empty)
        addresses = [pointer for layer in stored for pointer in (layer.keys.data_ptr(), layer.values.data_ptr())]
        stores = (ctypes.c_void_p * len(addresses))(*addresses)
        call.batch_stride, call.head_stride = stored[0].keys.stride()[:2]
        masks = [_dense(mask) if isinstance(mask := run.masks[window], Tensor) else None for window in self._windows]
        views = (_View * len(masks))()
        for view, window, mask_B1MS in zip(views, self._windows, masks, strict=True):
            seen = run.cache.views[window]
            view.start, view.length = seen.start, seen.length
            view.chain, view.window = isinstance(run.masks[window], ChainMasks), window or 0
            if mask_B1MS is not None:
                view.mask, view.mask_row_stride = mask_B1MS.data_ptr(), mask_B1MS.stride(2)
                view.mask_batch_stride = mask_B1MS.stride(0) if mask_B1MS.shape[0] > 1 else 0
        call.stores, call.views = ctypes.addressof(stores), ctypes.addressof(views)
        self._function(ctypes.addressof(call), ctypes.addressof(self._layers) + first * ctypes.sizeof(_Layer), count)
        return states, normed


def serves(hidden_BMD: Tensor, run: LeanPass) -> bool:
    """Whether the kernel may run this pass: a block over the cache, of few rows."""
    rows = hidden_BMD.shape[0] * hidden_BMD.shape[1]
    return bool(run.masks) and run.cache is not None and rows <= MOST_ROWS


def _dense(mask_B1MS: Tensor) -> Tensor:
    return mask_B1MS if mask_B1MS.stride(-1) == 1 else mask_B1MS.contiguous()


_Weight = tuple[Tensor | IntegerWeight, Tensor | None]


def _whole(linear: nn.Linear, quantizer: Quantizer | None) -> _Weight:
    weight = linear.weight.detach() if quantizer is None else quantizer(linear)
    return weight, None if linear.bias is None else linear.bias.detach()


def _split(linear: nn.Linear, sizes: Sequence[int], quantizer: Quantizer | None) -> list[_Weight]:
    """Rows of one matrix as several: views, since rows lie one after the other."""
    weight, bias = _whole(linear, quantizer)
    ends = list(itertools.accumulate(sizes))
    spans = list(zip([0, *ends], ends, strict=False))
    weights = [weight[a:b] if isinstance(weight, Tensor) else weight.rows(a, b) for a, b in spans]
    return [(part, None if bias is None else bias[a:b]) for part, (a, b) in zip(weights, spans, strict=True)]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
