"""The decoder families that heads can be attached to, and what is checked before one is admitted.

Legend: B batch, T positions, V vocabulary.

A family is admitted twice: by name and structure here (cheap, also on the meta device), and by a parity run of the very
model (`check_parity`), which catches anything a family does to its hidden states or logits that the heads would miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import IncompatibleModelError
from headway.functional.logits import SoftCap

# model_type -> (attribute of the decoder's layer list, attribute of its final norm)
SUPPORTED_FAMILIES: dict[str, tuple[str, str]] = {
    "gemma2": ("layers", "norm"),
    "gemma3_text": ("layers", "norm"),
    "gpt2": ("h", "ln_f"),
    "gpt_neox": ("layers", "final_layer_norm"),
    "llama": ("layers", "norm"),
    "mistral": ("layers", "norm"),
    "olmo2": ("layers", "norm"),
    "phi3": ("layers", "norm"),
    "qwen2": ("layers", "norm"),
    "qwen3": ("layers", "norm"),
}

_LAYER_TYPES = ("full_attention", "sliding_attention")

# config field -> what a truthy value of it means
_DISQUALIFYING: dict[str, str] = {
    "num_experts": "mixture-of-experts layers",
    "num_local_experts": "mixture-of-experts layers",
    "n_routed_experts": "mixture-of-experts layers",
    "num_kv_shared_layers": "layers that share keys and values",
    "use_bidirectional_attention": "bidirectional attention",
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "cross-attention",
    "quantization_config": "quantised weights",
}


@dataclass(frozen=True)
class Family:
    """Where an admitted model keeps what the heads need.

    Attributes:
        model_type: the Hugging Face name of the family.
        decoder: the model without its unembedding.
        layers: its decoder layers; the last one is head 1.
        norm: the final norm, shared by all offsets.
        lm_head: the unembedding, shared by all offsets.
        soft_cap: what the family does to its logits after the unembedding.
    """

    model_type: str
    decoder: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: nn.Linear
    soft_cap: SoftCap

    @property
    def last_layer(self) -> nn.Module:
        """The layer that predicts the next token; its input is the trunk's output z."""
        return self.layers[-1]


def resolve_family(causal_lm: Any) -> Family:
    """Find the parts of a causal LM that heads attach to.

    Raises:
        IncompatibleModelError: an unknown family, or a known one in a configuration that heads cannot follow; the
            message names what differs.
    """
    config: Any = getattr(causal_lm, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None or not hasattr(causal_lm, "forward"):
        raise IncompatibleModelError(
            f"heads attach to a Hugging Face causal LM: got {type(causal_lm).__name__}; load one with "
            f"transformers.AutoModelForCausalLM.from_pretrained"
        )
    check_config(config)
    layers_name, norm_name = SUPPORTED_FAMILIES[model_type]
    decoder = getattr(causal_lm, "base_model", None)
    lm_head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if decoder is None or decoder is causal_lm or not isinstance(lm_head, nn.Linear):
        raise IncompatibleModelError(
            f"a {model_type} model with a language-model head is needed: got {type(causal_lm).__name__}; load it with "
            f"AutoModelForCausalLM, not AutoModel"
        )
    layers, norm = getattr(decoder, layers_name, None), getattr(decoder, norm_name, None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise IncompatibleModelError(
            f"{type(causal_lm).__name__} does not keep its layers and final norm where a {model_type} model does "
            f"({layers_name}, {norm_name}); heads attach only to the family's own classes"
        )
    if len(layers) != config.num_hidden_layers:
        raise IncompatibleModelError(
            f"{type(causal_lm).__name__} has {len(layers)} layers, its configuration says {config.num_hidden_layers}; "
            f"make them agree before attaching heads"
        )
    bias: Tensor | None = lm_head.bias
    if bias is not None:
        raise IncompatibleModelError(
            f"the unembedding of this {model_type} model has a bias, which the shared unembedding of the heads does not "
            f"support; use a checkpoint without one"
        )
    return Family(
        model_type=model_type,
        decoder=decoder,
        layers=layers,
        norm=norm,
        lm_head=lm_head,
        soft_cap=SoftCap(getattr(config, "final_logit_softcapping", None)),
    )


def check_config(config: Any) -> None:
    """Refuse, by its configuration alone, a model that heads cannot follow.

    Raises:
        IncompatibleModelError: names what differs and lists the families that work.
    """
    model_type = getattr(config, "model_type", None)
    known = ", ".join(sorted(SUPPORTED_FAMILIES))
    reasons = [f"it has {what} ({name}={value!r})" for name, what, value in _disqualified(config)]
    layer_types = getattr(config, "layer_types", None) or ()
    foreign = sorted({str(kind) for kind in layer_types if kind not in _LAYER_TYPES})
    if foreign:
        reasons.append(
            f"it has layers of type {', '.join(foreign)}, whose state cannot be rolled back or replayed by heads"
        )
    if model_type not in SUPPORTED_FAMILIES:
        differs = "; ".join(reasons) if reasons else "its layers, masks and logits have not been checked against heads"
        raise IncompatibleModelError(
            f"heads cannot be attached to a {model_type!r} model: {differs}; families that work: {known}"
        )
    if reasons:
        raise IncompatibleModelError(
            f"heads cannot be attached to this {model_type} model: {'; '.join(reasons)}; use a checkpoint without it"
        )


def _disqualified(config: Any) -> list[tuple[str, str, Any]]:
    found = []
    for name, what in _DISQUALIFYING.items():
        value = getattr(config, name, None)
        if value:
            found.append((name, what, value))
    return found


def check_shared_parts(causal_lm: Any, family: Family) -> None:
    """Refuse a base whose final norm or unembedding is no longer the module that the heads share with it.

    Raises:
        IncompatibleModelError: it was wrapped or replaced (by an adapter on it, say), so that heads and base would part.
    """
    norm = getattr(family.decoder, SUPPORTED_FAMILIES[family.model_type][1])
    for what, module, shared in (
        ("unembedding", causal_lm.get_output_embeddings(), family.lm_head),
        ("final norm", norm, family.norm),
    ):
        if module is not shared:
            raise IncompatibleModelError(
                f"the {what} of the base is now a {type(module).__name__} and no longer the one that the heads share; leave "
                f"it out of target_modules and modules_to_save (headway.model.lora.lora_module_names names what can be "
                f"adapted), or attach heads after replacing it"
            )


@torch.no_grad()
def check_parity(
    causal_lm: Any,
    family: Family,
    run: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Compare the base's own logits with those of the heads' path on a few tokens of this very model.

    Args:
        causal_lm: the model; its training mode is restored afterwards.
        family: its parts.
        run: input_ids -> (logits from the decoder's final hidden state, logits of a replayed last layer).

    Raises:
        IncompatibleModelError: they differ: the family does something after its last layer that the heads would miss.
    """
    parameter = family.lm_head.weight
    if parameter.device.type == "meta":
        return
    vocabulary = parameter.shape[0]
    device = causal_lm.get_input_embeddings().weight.device
    input_ids_BT = (torch.arange(16, device=device) * 7919 % vocabulary).view(2, 8)
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        own_BTV = causal_lm(input_ids=input_ids_BT, use_cache=False).logits
        decoder_BTV, replayed_BTV = run(input_ids_BT)
    finally:
        causal_lm.train(was_training)
    scale = max(1.0, float(own_BTV.abs().max()))
    tolerance = scale * {torch.float64: 1e-6, torch.float32: 1e-5}.get(own_BTV.dtype, 3e-2)
    for path, logits_BTV in (("final hidden state", decoder_BTV), ("replayed last layer", replayed_BTV)):
        gap = float((own_BTV - logits_BTV.to(own_BTV.device)).abs().max())
        if not gap <= tolerance:
            raise IncompatibleModelError(
                f"this {family.model_type} model's own logits differ from those of the heads' path by {gap:.3g} (limit "
                f"{tolerance:.3g}, through its {path}): it changes hidden states or logits in a way that heads do not "
                f"follow (scaling, extra norms, adapters); use the family's plain class"
            )
