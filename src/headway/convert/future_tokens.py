"""Changing n: drop the farthest heads, or add heads, without building the model.

Source: Gloeckle et al. 2024, section 2 (head 1 alone is the plain model) and Appendix D (heads added to a next-token
model).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from headway.convert.architecture import Architecture, architecture, empty_model, unlike_the_paper
from headway.convert.lazy_model import LazyModel, LazyTensor
from headway.convert.plain_folder import PLAIN
from headway.errors import ConfigError
from headway.model.config import HeadInit


def with_future_tokens(model: LazyModel, num_future_tokens: int, *, head_init: HeadInit, seed: int) -> LazyModel:
    """The same model with another n; the base and the heads that stay are not touched.

    Args:
        model: any model of the common form.
        num_future_tokens: the new n; 1 leaves no heads.
        head_init: how heads that are added start: as copies of the base's last layer, or as the family draws a layer.
        seed: of fresh heads; the offset of each is added to it.

    Raises:
        ConfigError: heads of a kind that cannot be changed one by one.
    """
    old, new = model.num_future_tokens, num_future_tokens
    if new == old:
        return model
    other = unlike_the_paper(model.mtp_config)
    if other:
        raise ConfigError(
            f"num_future_tokens can be changed for parallel transformer heads alone: got {', '.join(other)}; leave it out"
        )
    heads = {name: tensor for name, tensor in model.heads.items() if int(name.partition(".")[0]) < new - 1}
    mtp_config = replace(model.mtp_config, num_future_tokens=new, offset_weights=_weights(model, new))
    if new < old:
        notes: tuple[str, ...] = (f"heads dropped: {_offsets(new + 1, old)}",)
    else:
        mtp_config = replace(mtp_config, head_init=head_init)
        heads |= _added(model, range(old - 1, new - 1), head_init=head_init, seed=seed)
        how = "copies of the base's last layer" if head_init == "copy" else f"drawn at random (seed {seed})"
        notes = (f"heads added: {_offsets(old + 1, new)}, {how}; they need training before they predict",)
    if model.mtp_config.offset_weights is not None and new > old:
        notes += (f"loss weight 1: {_offsets(old + 1, new)}",)
    return replace(model, mtp_config=mtp_config, heads=heads, notes=model.notes + notes)


def _offsets(first: int, last: int) -> str:
    return f"offset {first}" if first == last else f"offsets {first} to {last}"


def _weights(model: LazyModel, new: int) -> tuple[float, ...] | None:
    weights = model.mtp_config.offset_weights
    return None if weights is None else (weights + (1.0,) * new)[:new]


def last_layer(base: Mapping[str, LazyTensor], needed: Architecture) -> dict[str, LazyTensor]:
    """Tensors of the base's last layer by their names inside it."""
    prefix = needed.last_layer
    return {name.removeprefix(prefix): tensor for name, tensor in base.items() if name.startswith(prefix)}


def _added(model: LazyModel, indices: range, *, head_init: HeadInit, seed: int) -> dict[str, LazyTensor]:
    layer = last_layer(model.base, architecture(model.config, PLAIN))
    if head_init == "copy":
        return {
            f"{index}.{name}": replace(tensor, origin="copy") for index in indices for name, tensor in layer.items()
        }

    # One head in memory: the writer takes the tensors of a head one after the other.
    @functools.lru_cache(maxsize=1)
    def head(index: int) -> dict[str, Tensor]:
        return _fresh_head(model, layer, seed=seed + index + 2)

    def reader(index: int, name: str) -> Callable[[], Tensor]:
        return lambda: head(index)[name]

    return {
        f"{index}.{name}": replace(tensor, read=reader(index, name), origin="fresh")
        for index in indices
        for name, tensor in layer.items()
    }


def _fresh_head(model: LazyModel, layer: Mapping[str, LazyTensor], *, seed: int) -> dict[str, Tensor]:
    empty = empty_model(model.config, PLAIN)
    drawn = empty.family.last_layer.to_empty(device="cpu")
    # What the family's initialiser leaves alone stays as in the last layer, as it does in attach_heads.
    drawn.load_state_dict({name: tensor.read() for name, tensor in layer.items()})
    for parameter in drawn.parameters():
        # Set by transformers on tensors that it has initialised; its initialiser skips tensors that have it.
        if hasattr(parameter, "_is_hf_initialized"):
            del parameter._is_hf_initialized
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in drawn.modules():
            empty.base._init_weights(module)
    return {name: values.to(layer[name].dtype) for name, values in drawn.state_dict().items()}
