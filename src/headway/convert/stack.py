"""The plain model of heads that are part of the next-token path, tensor by tensor.

The same as `headway.model.stack.plain_stack`, which needs the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headway.convert.architecture import PLAIN, architecture
from headway.convert.lazy_model import LazyModel, LazyTensor
from headway.model.stack import stack_config


def plain_stack(model: LazyModel) -> LazyModel:
    """Trunk, heads from the farthest offset on, last layer: one base whose next token is the model's.

    Args:
        model: one with anticausal heads.
    """
    per_head = model.mtp_config.layers_per_head
    inserted = (model.num_future_tokens - 1) * per_head
    layers, _, index = architecture(model.config, PLAIN).last_layer.removesuffix(".").rpartition(".")
    last = int(index)
    base = {}
    for name, tensor in model.base.items():
        inside = name.removeprefix(f"{layers}.{last}.")
        base[name if inside == name else f"{layers}.{last + inserted}.{inside}"] = tensor
    base |= _inserted(model.heads, f"{layers}.", first=last, num_heads=model.num_future_tokens - 1, per_head=per_head)
    note = f"the next token runs through the heads: they became layers {last} to {last + inserted - 1} of a plain model"
    return replace(
        model,
        config=stack_config(model.config, num_inserted=inserted),
        mtp_config=PLAIN,
        base=base,
        heads={},
        notes=(*model.notes, note),
    )


def _inserted(
    heads: Mapping[str, LazyTensor], prefix: str, *, first: int, num_heads: int, per_head: int
) -> dict[str, LazyTensor]:
    layers = {}
    for name, tensor in heads.items():
        head, _, inside = name.partition(".")
        if not head.isdigit():  # a bias on drafts, which the next token does not have
            continue
        place = 0
        if per_head > 1:
            number, _, inside = inside.partition(".")
            place = int(number)
        layers[f"{prefix}{first + (num_heads - 1 - int(head)) * per_head + place}.{inside}"] = tensor
    return layers
