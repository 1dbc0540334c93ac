"""Changing n: drop the farthest heads, or add heads, without building the model.

Source: Gloeckle et al. 2024, section 2 (head 1 alone is the plain model) and Appendix D (heads added to a next-token
model).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from headway.convert.architecture import PLAIN, Architecture, architecture, empty_model
from headway.convert.lazy_model import LazyModel, LazyTensor
from headway.convert.new_heads import built_heads
from headway.errors import ConfigError
from headway.heads.options import CHANGES_BASE, AuxiliaryOptions, HeadInit
from headway.heads.parts import draw
from headway.model.config import MultiTokenConfig


def with_future_tokens(model: LazyModel, num_future_tokens: int, *, head_init: HeadInit, seed: int) -> LazyModel:
    """The same model with another n; the base and the heads that stay are not touched.

    Args:
        model: any model of the common form.
        num_future_tokens: the new n; 1 leaves no heads.
        head_init: how heads that are added start: as copies of the base's last layer, or as the family draws a layer.
        seed: of fresh heads; each layer adds its number to it.

    Raises:
        ConfigError: heads that are part of the next-token path.
    """
    old, new = model.num_future_tokens, num_future_tokens
    if new == old:
        return model
    if model.mtp_config.wiring in CHANGES_BASE:
        raise ConfigError(
            f"heads with wiring={model.mtp_config.wiring!r} are part of the next-token path: without one of them, or with "
            f"one more, it is another model; leave num_future_tokens out"
        )
    mtp_config = replace(model.mtp_config, num_future_tokens=new, offset_weights=_weights(model, new))
    needed = architecture(model.config, mtp_config).heads
    heads = {name: tensor for name, tensor in model.heads.items() if name in needed}
    missing = sorted(needed.keys() - heads.keys())
    if new < old:
        notes: tuple[str, ...] = (f"heads dropped: {_offsets(new + 1, old)}",)
    elif not missing and model.heads:
        notes = (f"no head added: the shared module serves {_offsets(old + 1, new)} too",)
    else:
        mtp_config = replace(mtp_config, head_init=head_init)
        heads |= _added(model, mtp_config, missing, seed=seed)
        how = "copies of the base's last layer" if mtp_config.heads == "transformer" else "as they start from the base"
        if head_init == "fresh":
            how = f"drawn at random (seed {seed})"
        notes = (f"heads added: {_offsets(old + 1, new)}, {how}; they need training before they predict",)
    if model.mtp_config.offset_weights is not None and new > old:
        notes += (f"loss weight 1: {_offsets(old + 1, new)}",)
    return replace(model, mtp_config=mtp_config, heads=heads, notes=model.notes + notes)


def without_auxiliary(model: LazyModel) -> LazyModel:
    """The same model without what an auxiliary objective added for training; it is named as left out."""
    config = model.mtp_config
    if config.auxiliary == "none":
        return model
    heads = {name: tensor for name, tensor in model.heads.items() if not name.startswith("auxiliary.")}
    left_out = tuple(
        f"{name}: the objective auxiliary={config.auxiliary!r} alone uses it, in training"
        for name in model.heads
        if name not in heads
    )
    nothing: dict[str, Any] = {field.name: field.default for field in fields(AuxiliaryOptions)}
    return replace(model, mtp_config=replace(config, **nothing), heads=heads, left_out=model.left_out + left_out)


def _offsets(first: int, last: int) -> str:
    return f"offset {first}" if first == last else f"offsets {first} to {last}"


def _weights(model: LazyModel, new: int) -> tuple[float, ...] | None:
    weights = model.mtp_config.offset_weights
    return None if weights is None else (weights + (1.0,) * new)[:new]


def last_layer(base: Mapping[str, LazyTensor], needed: Architecture) -> dict[str, LazyTensor]:
    """Tensors of the base's last layer by their names inside it."""
    prefix = needed.last_layer
    return {name.removeprefix(prefix): tensor for name, tensor in base.items() if name.startswith(prefix)}


def _added(model: LazyModel, mtp_config: MultiTokenConfig, names: Sequence[str], *, seed: int) -> dict[str, LazyTensor]:
    if mtp_config.heads != "transformer" or not all(name[0].isdigit() for name in names):
        return built_heads(model, mtp_config, names, seed=seed)
    layer = last_layer(model.base, architecture(model.config, PLAIN))
    places = {name: _inside(name, mtp_config.layers_per_head) for name in names}
    if mtp_config.head_init == "copy":
        return {name: replace(layer[inside], origin="copy") for name, (_, inside) in places.items()}

    # One layer in memory: the writer takes the tensors of a layer one after the other.
    @functools.lru_cache(maxsize=1)
    def drawn(place: int) -> dict[str, Tensor]:
        return _fresh_layer(model, layer, seed=seed + place)

    def reader(place: int, inside: str) -> Callable[[], Tensor]:
        return lambda: drawn(place)[inside]

    return {
        name: replace(layer[inside], read=reader(place, inside), origin="fresh")
        for name, (place, inside) in places.items()
    }


def _inside(name: str, layers_per_head: int) -> tuple[int, str]:
    """Which layer of the heads, counted through, a tensor belongs to, and its name there.

    >>> _inside("2.mlp.up_proj.weight", 1), _inside("2.1.mlp.up_proj.weight", 2)
    ((2, 'mlp.up_proj.weight'), (5, 'mlp.up_proj.weight'))
    """
    head, _, inside = name.partition(".")
    if layers_per_head == 1:
        return int(head), inside
    place, _, inside = inside.partition(".")
    return int(head) * layers_per_head + int(place), inside


def _fresh_layer(model: LazyModel, layer: Mapping[str, LazyTensor], *, seed: int) -> dict[str, Tensor]:
    empty = empty_model(model.config, PLAIN)
    drawn = empty.family.last_layer.to_empty(device="cpu")
    # What the family's initialiser leaves alone stays as in the last layer, as it does in attach_heads.
    drawn.load_state_dict({name: tensor.read() for name, tensor in layer.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw(drawn, empty.base._init_weights)
    return {name: values.to(layer[name].dtype) for name, values in drawn.state_dict().items()}
