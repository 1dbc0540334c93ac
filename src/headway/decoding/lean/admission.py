"""Who may run lean: families with a lean block, and of those the checkpoints that pass a parity run.

Legend: B rows, T positions, D width.
"""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headway.decoding.cache import RaggedCache
from headway.decoding.lean.few_rows import kernel_for
from headway.decoding.lean.layer import LeanLayer
from headway.decoding.lean.model import LeanModel
from headway.decoding.lean.passes import LeanPass
from headway.decoding.masks import additive_mask
from headway.functional.rotary import signed_sine

LEAN_FAMILIES = frozenset({"llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings that depend on the position alone and not on the length of the text."""

TOLERANCE = 1e-5
"""Largest difference of a float32 layer output or logit, relative to the largest value."""

WeightsName = Literal["own", "int8"]

logger = logging.getLogger(__name__)
_READY: weakref.WeakKeyDictionary[Any, dict[WeightsName, LeanModel | str]] = weakref.WeakKeyDictionary()


def lean_model(model: Any, *, weights: WeightsName = "own") -> LeanModel | str:
    """The lean counterpart of a model, made at the first call and again when its weights have changed.

    Args:
        model: a `MultiTokenLM`.
        weights: "own", or "int8", rounded: another model (`headway.decoding.lean.integers`).

    Returns:
        The counterpart; or, in a sentence, why there is none.
    """
    kept = _READY.setdefault(model, {})
    ready = kept.get(weights)
    if isinstance(ready, LeanModel) and ready.up_to_date:
        return ready
    reason = why_not_lean(model)
    if reason is None and weights == "int8" and kernel_for(model.family.lm_head.weight) is None:
        reason = "products of int8 weights need the C++ kernel: a compiler, a CPU, and a float32 or bfloat16 model"
    if reason is None:
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                gap = largest_gap(model)
                if gap <= TOLERANCE:
                    kept[weights] = made = LeanModel(model, way="int8" if weights == "int8" else None)
                    return made
        finally:
            model.train(was_training)
        reason = (
            f"in float32 its layers differ from the family's own by {gap:.3g} (limit {TOLERANCE:g}): this checkpoint does "
            f"something that the lean block does not"
        )
    kept[weights] = reason
    return reason


def why_not_lean(model: Any) -> str | None:
    """What, by structure alone, keeps a model from running lean; None where nothing does."""
    config, family = model.config, model.family
    if family.model_type not in LEAN_FAMILIES:
        return f"the lean block is written for {', '.join(sorted(LEAN_FAMILIES))}, not for {family.model_type}"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        return f"its weights are on {len(devices)} devices, or on none: {', '.join(sorted(map(str, devices)))}"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        return f"its weights are of several kinds: {', '.join(sorted(map(str, dtypes)))}"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        return f"rotary embeddings of type {rope_type!r} depend on the length of the text"
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") or hasattr(module, "parametrizations"):
            return f"{name} is wrapped ({type(module).__name__}); merge the adapter first"
    return None


@torch.no_grad()
def largest_gap(model: Any) -> float:
    """The largest relative difference between the family's own layers and lean ones, all in float32.

    Layer after layer of base and heads is copied, cast to float32 and run both ways on the same input, the family's own
    output being the next one's input; at the end norm and unembedding. No more than two layers' copies exist at a time.
    """
    family = model.family
    parameter = family.lm_head.weight
    ids_BT = (torch.arange(24, device=parameter.device) * 7919 % parameter.shape[0]).view(2, 12)
    position_ids_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    hidden_BTD = model.get_input_embeddings()(ids_BT).float()
    cos, sin = family.decoder.rotary_emb(hidden_BTD, position_ids_BT)
    rotary = cos[0].contiguous(), signed_sine(sin[0])
    causal = LeanPass(rotary, position_ids_BT, {}, None)
    mask = additive_mask(position_ids_BT, position_ids_BT[0], window=None, dtype=torch.float32)
    gap = 0.0
    trunk_BTD = hidden_BTD
    for place, layer in enumerate([*family.layers, *model.heads.decoder_layers]):
        if place == len(family.layers):
            hidden_BTD = trunk_BTD
        elif place == len(family.layers) - 1:
            trunk_BTD = hidden_BTD
        wide = _without_hooks(copy.deepcopy(layer)).float().eval()
        own_BTD = _own_output(wide, hidden_BTD, mask, position_ids_BT, (cos, sin))
        lean = LeanLayer(wide, window=None)
        gap = max(gap, _relative(own_BTD, lean(hidden_BTD, causal, cache_index=place)))
        # As a block over the cache, which takes another way through the layer (`headway.decoding.lean.stack`).
        cache = RaggedCache([None], batch=ids_BT.shape[0], capacity=ids_BT.shape[1], device=ids_BT.device)
        cache.begin_aligned(0, ids_BT.shape[1])
        block = LeanPass(rotary, position_ids_BT, {None: mask}, cache)
        gap = max(gap, _relative(own_BTD, lean(hidden_BTD, block, cache_index=0)))
        hidden_BTD = own_BTD
    return gap


def _own_output(
    layer: Any, hidden_BTD: Tensor, mask: Tensor, position_ids_BT: Tensor, position_embeddings: Any
) -> Tensor:
    output = layer(
        hidden_BTD,
        attention_mask=mask.expand(hidden_BTD.shape[0], -1, -1, -1),
        position_ids=position_ids_BT,
        position_embeddings=position_embeddings,
    )
    own_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return own_BTD


def _without_hooks(module: nn.Module) -> nn.Module:
    for part in module.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return module


def _relative(own: Tensor, lean: Tensor) -> float:
    return float((own - lean).abs().max() / own.abs().max().clamp(min=1.0))
