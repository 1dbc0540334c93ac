"""Tensors of sequential modules: released checkpoints' names and those of headway.

Legend: k module (offset k + 2), L layers of the base, D width.

    DeepSeek, GLM, transformers   model.layers.{L+k}.*, mtp.layers.{k}.*: enorm, hnorm, eh_proj, shared_head.norm, block
    Qwen, Mellum                  mtp.{pre_fc_norm_embedding, pre_fc_norm_hidden, fc, norm}, mtp.layers.0.*: block
    MiMo                          model.mtp_layers.{k}.*: token_layernorm, hidden_layernorm, input_proj, final_layernorm, block

The projection multiplies [embedding; hidden state], in MiMo's checkpoints [hidden state; embedding] as in the papers and
in headway: where it is the other way round the two halves of its columns change places, nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headway.convert.lazy_model import LazyTensor
from headway.errors import CheckpointError, IncompatibleModelError

_NUMBERED = re.compile(r"(?:model\.)?(?:mtp\.layers|mtp_layers|mtp)\.(\d+)\.(.+)")
_APPENDED = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_SINGLE = re.compile(r"(?:model\.)?mtp\.((?:fc|norm|pre_fc_norm_embedding|pre_fc_norm_hidden)\..+)")
_BLOCK = re.compile(r"^(?:mtp_block|transformer_block)\.")

_OWN_NAMES = {
    **dict.fromkeys(("enorm", "embed_norm", "pre_fc_norm_embedding", "token_layernorm"), "embedding_norm"),
    **dict.fromkeys(("hnorm", "hidden_norm", "pre_fc_norm_hidden", "hidden_layernorm"), "hidden_norm"),
    **dict.fromkeys(("eh_proj", "fc", "input_proj"), "projection"),
    **dict.fromkeys(("shared_head.norm", "post_norm", "final_layernorm", "norm"), "output_norm"),
}
_HIDDEN_FIRST = "token_layernorm"  # MiMo's name
_REPEATED = {"shared_head.head.weight": "lm_head.weight", "embed_tokens.weight": "model.embed_tokens.weight"}
_COMPUTED = "rotary_emb.inv_freq"

EMBEDDING_NORM, HIDDEN_NORM, PROJECTION, OUTPUT_NORM = "enorm", "hnorm", "eh_proj", "shared_head.norm"
_WRITTEN = {
    "embedding_norm": EMBEDDING_NORM,
    "hidden_norm": HIDDEN_NORM,
    "projection": PROJECTION,
    "output_norm": OUTPUT_NORM,
}


@dataclass(frozen=True)
class SequentialTensors:
    """The modules of a checkpoint, sorted.

    Attributes:
        modules: by headway's names inside a module, such as `projection.weight`, `layer.mlp.up_proj.weight`; the
            projection's columns in the file's order.
        hidden_first: whether the projection multiplies [hidden state; embedding].
        repeated: tensors that repeat one of the base: name in the file -> (name in the base, tensor).
        base: what is left: the base's tensors by their names on disk.
        left_out: computed buffers, with the reason.
    """

    modules: tuple[Mapping[str, LazyTensor], ...]
    hidden_first: bool
    repeated: Mapping[str, tuple[str, LazyTensor]]
    base: Mapping[str, LazyTensor]
    left_out: tuple[str, ...]

    def to_heads(self) -> dict[str, LazyTensor]:
        """The state dict of the heads."""
        return {
            f"{index}.{name}": tensor if self.hidden_first or name != "projection.weight" else halves_swapped(tensor)
            for index, module in enumerate(self.modules)
            for name, tensor in module.items()
        }


def halves_swapped(projection: LazyTensor) -> LazyTensor:
    """A projection for [a; b] as one for [b; a]: its columns' halves in the other order; the inverse of itself."""

    def read() -> Tensor:
        first, second = projection.read().chunk(2, dim=1)
        return torch.cat((second, first), dim=1)

    return replace(projection, read=read)


def sort_tensors(
    found: Mapping[str, LazyTensor], *, num_layers: int, hidden_first: bool, where: str
) -> SequentialTensors:
    """Take the sequential modules of a checkpoint from its tensors.

    Args:
        found: all tensors by their names on disk.
        num_layers: L.
        hidden_first: what the configuration says of the projection; MiMo's names say it themselves.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: no module, a gap in their numbers.
        IncompatibleModelError: several layers in one module.
    """
    modules: dict[int, dict[str, LazyTensor]] = {}
    base: dict[str, LazyTensor] = {}
    repeated: dict[str, tuple[str, LazyTensor]] = {}
    left_out: list[str] = []
    single = False
    for name, tensor in found.items():
        place = _place(name, num_layers)
        if place is None:
            base[name] = tensor
            continue
        index, inside = place
        single |= _SINGLE.fullmatch(name) is not None
        part, _, what = inside.rpartition(".")
        hidden_first |= part == _HIDDEN_FIRST
        if inside in _REPEATED:
            repeated[name] = (_REPEATED[inside], tensor)
        elif inside.endswith(_COMPUTED):
            left_out.append(f"{name}: the model computes it")
        else:
            own = f"{_OWN_NAMES[part]}.{what}" if part in _OWN_NAMES else f"layer.{_BLOCK.sub('', inside)}"
            modules.setdefault(index, {})[own] = tensor
    if modules and min(modules) >= num_layers:
        modules = {index - num_layers: module for index, module in modules.items()}
    if single and len(modules) > 1:
        raise IncompatibleModelError(
            f"{where} has one projection for {len(modules)} layers in a row; headway's sequential modules have one layer each"
        )
    if not modules or sorted(modules) != list(range(len(modules))):
        held = f"modules {', '.join(map(str, sorted(modules)))}" if modules else "none"
        raise CheckpointError(
            f"{where} must hold sequential modules numbered without a gap: it holds {held}; restore its files, or read a "
            f"plain checkpoint as --from hf",
            path=where,
        )
    return SequentialTensors(
        tuple(modules[index] for index in range(len(modules))), hidden_first, repeated, base, tuple(left_out)
    )


def _place(name: str, num_layers: int) -> tuple[int, str] | None:
    """Module and name inside it; None for a tensor of the base.

    >>> _place("model.layers.7.enorm.weight", 7), _place("model.layers.6.mlp.up_proj.weight", 7)
    ((7, 'enorm.weight'), None)
    """
    single = _SINGLE.fullmatch(name)
    if single is not None:
        return 0, single[1]
    numbered = _NUMBERED.fullmatch(name)
    if numbered is not None:
        return int(numbered[1]), numbered[2]
    appended = _APPENDED.fullmatch(name)
    if appended is not None and int(appended[1]) >= num_layers:
        return int(appended[1]), appended[2]
    return None


def written_name(name: str, prefix: str, *, num_layers: int) -> str:
    """The name in an exported checkpoint of a tensor of the heads.

    >>> written_name("1.projection.weight", "model.mtp", num_layers=28)
    'model.mtp.layers.29.eh_proj.weight'
    """
    index, _, inside = name.partition(".")
    part, _, rest = inside.partition(".")
    inside = rest if part == "layer" else f"{_WRITTEN[part]}.{rest}"
    # Numbered on from the base's layers: transformers takes an index below L for one of the base's own.
    return f"{prefix}.layers.{num_layers + int(index)}.{inside}"
