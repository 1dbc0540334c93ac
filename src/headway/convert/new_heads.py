"""Heads of any architecture for a base on disk, of which only a few matrices are in memory.

Transformer heads come one layer at a time (see `future_tokens`); the others are built together, their output matrices apart,
which are copied or drawn one at a time when they are written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headway.convert.architecture import PLAIN, Architecture, architecture, empty_model
from headway.convert.lazy_model import LazyModel, LazyTensor
from headway.heads.build import build_heads
from headway.heads.parts import BaseParts
from headway.model.config import MultiTokenConfig

_UNEMBEDDING = re.compile(r"unembeddings\.(\d+)\.weight")


@dataclass(frozen=True)
class _Parts(BaseParts):
    """Parts whose new output matrices take no memory: each is made when it is read."""

    def new_unembeddings(self, count: int) -> list[nn.Linear]:
        """Shapes alone."""
        dtype = self.unembedding.weight.dtype
        return [nn.Linear(self.width, self.vocabulary, bias=False, device="meta", dtype=dtype) for _ in range(count)]


def built_heads(
    model: LazyModel, mtp_config: MultiTokenConfig, names: Sequence[str], *, seed: int
) -> dict[str, LazyTensor]:
    """Tensors of new heads as `attach_heads` starts them.

    Args:
        model: its base.
        mtp_config: what the model becomes.
        names: in the state dict of its heads, those that are needed.
        seed: of what is drawn.
    """
    parts = _parts(model, fresh=mtp_config.head_init == "fresh")
    state = _state(parts, mtp_config, seed)
    # What another seed changes was drawn; the rest is copied, or zero, one or the identity.
    other = _state(parts, mtp_config, seed + 1)
    tensors = {}
    for name in names:
        unembedding = _UNEMBEDDING.fullmatch(name)
        if unembedding is None:
            drawn = not torch.equal(state[name], other[name])
            tensors[name] = _held(state[name], drawn=drawn)
        elif parts.fresh:
            # Far from the seeds of other heads and layers.
            tensors[name] = _drawn(parts, seed=seed + 10_000 + int(unembedding[1]))
        else:
            tensors[name] = _held(parts.unembedding.weight.detach(), drawn=False)
    return tensors


def _held(values: Tensor, *, drawn: bool) -> LazyTensor:
    return LazyTensor(
        shape=tuple(values.shape), dtype=values.dtype, read=lambda: values, origin="fresh" if drawn else "copy"
    )


def _drawn(parts: BaseParts, *, seed: int) -> LazyTensor:
    def read() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return parts.linear(parts.width, parts.vocabulary).weight.detach()

    return LazyTensor(
        shape=(parts.vocabulary, parts.width), dtype=parts.unembedding.weight.dtype, read=read, origin="fresh"
    )


def _state(parts: BaseParts, mtp_config: MultiTokenConfig, seed: int) -> Mapping[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = build_heads(
            mtp_config.heads,
            mtp_config.head_options,
            parts,
            num_heads=mtp_config.num_future_tokens - 1,
        )
    state: Mapping[str, Tensor] = heads.state_dict()
    return state


def _parts(model: LazyModel, *, fresh: bool) -> _Parts:
    empty = empty_model(model.config, PLAIN)
    needed = architecture(model.config, PLAIN)
    family, base = empty.family, empty.base
    read = _reader(model, needed)

    def filled(module: nn.Module) -> nn.Module:
        prefix = next(name for name, found in base.named_modules() if found is module)
        values = {name: read(f"{prefix}.{name}") for name in module.state_dict()}
        # Its own precision, tensor by tensor: assigned, not copied into what the configuration says.
        module.to_empty(device="cpu").load_state_dict(values, assign=True)
        return module

    unembedding = filled(family.lm_head)
    assert isinstance(unembedding, nn.Linear)
    return _Parts(
        last_layer=filled(family.last_layer),
        norm=filled(family.norm),
        unembedding=unembedding,
        num_layers=len(family.layers),
        initialize=base._init_weights,
        fresh=fresh,
    )


def _reader(model: LazyModel, needed: Architecture) -> Callable[[str], Tensor]:
    base = model.whole_base
    return lambda name: base[needed.tied.get(name, name) if name not in base else name].read()
