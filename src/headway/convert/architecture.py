"""Which tensors a model must have, learned from the model's own classes without allocating anything."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from headway.convert.lazy_model import LazyTensor
from headway.errors import CheckpointError
from headway.model.attach import attach_heads
from headway.model.config import MultiTokenConfig
from headway.model.families import check_config
from headway.model.fingerprint import untied_tensors
from headway.model.multi_token_lm import MultiTokenLM

PLAIN = MultiTokenConfig(num_future_tokens=1)

Shapes = dict[str, tuple[int, ...]]

# model_type -> name in a state dict -> name on disk, where transformers writes another one
_NAMES_ON_DISK: dict[str, dict[str, str]] = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}

# Buffers that older versions of transformers saved and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|attention\.(?:bias|masked_bias)$|attn\.(?:bias|masked_bias)$")

_MOST_NAMES = 16


@dataclass(frozen=True)
class Architecture:
    """The tensors of a multi-token model.

    Attributes:
        base: names in the base's state dict -> shapes; tied repetitions left out.
        heads: names in the state dict of the heads -> shapes.
        tied: tied name -> the name that holds its values.
        last_layer: prefix of the base's last layer, such as `model.layers.3.`.
        decoder: prefix of the base without its unembedding, such as `model`.
        class_name: class of the base, for `architectures` in config.json.
        model_type: family.
    """

    base: Shapes
    heads: Shapes
    tied: Mapping[str, str]
    last_layer: str
    decoder: str
    class_name: str
    model_type: str

    def on_disk(self, name: str) -> str:
        """The name under which a plain Hugging Face checkpoint holds a tensor of the base."""
        return _NAMES_ON_DISK.get(self.model_type, {}).get(name, name)

    def in_memory(self, name: str) -> str:
        """The inverse of `on_disk`; also finds the decoder's tensors in checkpoints of the decoder alone."""
        for known, on_disk in _NAMES_ON_DISK.get(self.model_type, {}).items():
            if name == on_disk:
                return known
        if name not in self.base and name not in self.tied and f"{self.decoder}.{name}" in self.base:
            return f"{self.decoder}.{name}"
        return name


def unlike_the_paper(mtp_config: MultiTokenConfig) -> list[str]:
    """What makes heads other than those of the paper's section 2: one decoder layer per offset, all on the trunk.

    >>> unlike_the_paper(MultiTokenConfig(num_future_tokens=4))
    []
    """
    differs = [] if mtp_config.heads == "transformer" else [f"heads={mtp_config.heads!r}"]
    values = mtp_config.head_options
    return differs + [
        f"{field.name}={getattr(values, field.name)!r}"
        for field in fields(values)
        if getattr(values, field.name) != field.default
    ]


def empty_model(config: Any, mtp_config: MultiTokenConfig) -> MultiTokenLM:
    """The model of these configurations on the meta device: names and shapes, no memory.

    Raises:
        IncompatibleModelError: a family that heads cannot be attached to.
        CheckpointError: a configuration from which no model can be built.
    """
    check_config(config)
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as error:  # transformers lets whatever a senseless value causes escape
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CheckpointError(
            f"the configuration does not describe a model that can be built: {type(error).__name__}: {reason}; restore it"
        ) from error
    with torch.device("meta"):
        return attach_heads(base, mtp_config)


def architecture(config: Any, mtp_config: MultiTokenConfig) -> Architecture:
    """The tensors that a model of these configurations has.

    Raises:
        IncompatibleModelError, CheckpointError: see `empty_model`.
    """
    model = empty_model(config, mtp_config)
    base = model.base
    last = next(name for name, module in base.named_modules() if module is model.family.last_layer)
    return Architecture(
        base={name: tuple(tensor.shape) for name, tensor in untied_tensors(base, base.state_dict()).items()},
        heads={name: tuple(tensor.shape) for name, tensor in model.heads.state_dict().items()},
        tied=dict(getattr(base, "all_tied_weights_keys", None) or {}),
        last_layer=f"{last}.",
        decoder=str(base.base_model_prefix),
        class_name=type(base).__name__,
        model_type=str(base.config.model_type),
    )


def match_base(
    found: Mapping[str, LazyTensor], needed: Architecture, where: str
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Sort the tensors of a plain checkpoint into the base's state dict.

    Args:
        found: tensors by their names on disk.
        needed: what the base has.
        where: the checkpoint, for messages.

    Returns:
        The base's tensors, and what was left out with the reason: computed buffers, repetitions of tied tensors.

    Raises:
        CheckpointError: tensors that are missing, unknown or of another shape, by name.
    """
    base: dict[str, LazyTensor] = {}
    left_out: list[str] = []
    repeated: dict[str, LazyTensor] = {}
    unknown: list[str] = []
    for name, tensor in found.items():
        own = needed.in_memory(name)
        if own in needed.base:
            base[own] = tensor
        elif own in needed.tied:
            repeated[own] = tensor
        elif _COMPUTED.search(name):
            left_out.append(f"{name}: the model computes it")
        else:
            unknown.append(name)
    for name, tensor in repeated.items():
        source = needed.tied[name]
        if source not in base:
            base[source] = tensor
        elif torch.equal(base[source].read(), tensor.read()):
            left_out.append(f"{name}: repeats {source}, to which it is tied")
        else:
            raise CheckpointError(
                f"{where} ties {name} to {source} in config.json but holds different values for both; set "
                f"tie_word_embeddings to false there if both are meant"
            )
    check_complete(base, needed.base, where, unknown=unknown)
    return base, tuple(left_out)


def check_complete(
    found: Mapping[str, LazyTensor], needed: Mapping[str, tuple[int, ...]], where: str, *, unknown: list[str]
) -> None:
    """Hold the tensors of a source to those that the model has.

    Raises:
        CheckpointError: names what is missing, unknown or of another shape.
    """
    missing = sorted(needed.keys() - found.keys())
    shapes = [
        f"{name} is {found[name].shape} and must be {needed[name]}"
        for name in sorted(found.keys() & needed.keys())
        if found[name].shape != needed[name]
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:_MOST_NAMES])}{', ...' if len(names) > _MOST_NAMES else ''}"
        for what, names in (
            ("tensors missing", missing),
            ("tensors that the model has no place for", sorted(unknown)),
            ("tensors of another shape", shapes),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{where} does not hold this model: {'; '.join(faults)}; nothing was converted", path=where
        )
