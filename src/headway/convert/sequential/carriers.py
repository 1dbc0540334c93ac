"""Classes of transformers in which a dense model with sequential modules runs as it is.

`generate(use_mtp=True)` of transformers 5.23 works for classes that register the names of their modules' tensors. No
dense family does. Two classes that do hold a dense block exactly when they are configured so:

    mimo_v2_flash   all layers dense with full attention: the block of llama, mistral and qwen2
    exaone_moe      all layers dense, a sliding window wider than the longest context: the block of qwen3

The tensors keep their names and values; config.json names the other class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, ExaoneMoeConfig, LlamaConfig, MiMoV2FlashConfig, Qwen2Config, Qwen3Config

from headway.errors import IncompatibleModelError
from headway.model.families import check_config

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_OF_MODULES = (
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "mtp_layer_types",
    "mtp_mlp_layer_types",
    "mtp_hidden_states_first",
    "mtp_loss_scaling_factor",
    "auto_map",
)
_MIMO_7B = "mimo"  # XiaomiMiMo/MiMo-7B: qwen2 with modules, in code of its own


@dataclass(frozen=True)
class Carrier:
    """A class that transformers drafts with.

    Attributes:
        config: what config.json says, modules included.
        prefix: before the modules' tensors.
        class_name: for `architectures`.
    """

    config: Any
    prefix: str
    class_name: str


def carrier(config: Any, *, num_modules: int) -> Carrier:
    """The class of transformers that runs this dense model with its modules.

    Raises:
        IncompatibleModelError: none does; names what stands against it and the nearest alternative.
    """
    reasons = _what_does_not_fit(config)
    if reasons:
        raise IncompatibleModelError(
            f"transformers has no class with use_mtp for this {config.model_type} model: {'; '.join(reasons)}; write it as "
            f"--to headway, which drafts with every family, or as --to hf without modules"
        )
    layers = int(config.num_hidden_layers)
    same = {name: getattr(config, name) for name in _SAME}
    rope = dict(config.rope_parameters)
    head_dim = head_width(config)
    if config.model_type == "qwen3":
        kind = "sliding_attention"  # the class rotates positions there alone; the window is wider than the context
        special: dict[str, Any] = {"sliding_window": int(config.max_position_embeddings), "rope_parameters": rope}
        made: Any = ExaoneMoeConfig(**same, **special, **_layers(layers, kind, num_modules), head_dim=head_dim)
        return Carrier(made, "mtp", "ExaoneMoeForCausalLM")
    special = {
        "head_dim": head_dim,
        "v_head_dim": head_dim,
        "attention_value_scale": None,
        "attention_bias": config.model_type == "qwen2",
        "rope_parameters": {"full_attention": rope | {"partial_rotary_factor": 1.0}},
    }
    made = MiMoV2FlashConfig(**same, **special, **_layers(layers, "full_attention", num_modules))
    return Carrier(made, "model.mtp", "MiMoV2FlashForCausalLM")


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _layers(layers: int, kind: str, num_modules: int) -> dict[str, Any]:
    return {
        "layer_types": [kind] * layers,
        "mlp_layer_types": ["dense"] * layers,
        "num_mtp_layers": num_modules,
        "mtp_layer_types": [kind] * num_modules,
        "mtp_mlp_layer_types": ["dense"] * num_modules,
    }


def _what_does_not_fit(config: Any) -> list[str]:
    if config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return ["llama, mistral, qwen2 and qwen3 blocks fit one of its classes, no other family's do"]
    reasons = []
    kinds = set(getattr(config, "layer_types", None) or ()) | (
        {"sliding_attention"} if config.model_type == "mistral" and config.sliding_window else set()
    )
    if "sliding_attention" in kinds:
        reasons.append("it has sliding windows")
    if config.model_type in ("llama", "qwen3") and config.attention_bias:
        reasons.append("its attention has biases")
    if getattr(config, "mlp_bias", False):
        reasons.append("its feed-forward layers have biases")
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        reasons.append(f"its rope scaling has not been checked (rope_type={rope['rope_type']!r})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("it rotates a part of each head alone")
    return reasons


def is_carrier(values: Mapping[str, Any]) -> bool:
    """Whether transformers itself drafts with a folder whose config.json says this."""
    return values.get("model_type") in ("mimo_v2_flash", "exaone_moe")


def family_config(values: Mapping[str, Any]) -> Any:
    """The configuration of the base alone, by its own family.

    Args:
        values: what config.json says.

    Raises:
        IncompatibleModelError: a base that heads cannot be attached to; names what differs.
        ValueError, KeyError, TypeError: values that make no configuration.
    """
    model_type = values.get("model_type")
    plain = {name: value for name, value in values.items() if name not in _OF_MODULES}
    if model_type == _MIMO_7B:
        return Qwen2Config.from_dict(plain | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    if is_carrier(values):
        return _from_carrier(values)
    config = CONFIG_MAPPING[model_type].from_dict(plain) if model_type in CONFIG_MAPPING else _Unknown(values)
    check_config(config)
    return config


class _Unknown:
    """A configuration that transformers does not know, for the message of `check_config`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def _from_carrier(values: Mapping[str, Any]) -> Any:
    mimo = values["model_type"] == "mimo_v2_flash"
    config: Any = (MiMoV2FlashConfig if mimo else ExaoneMoeConfig).from_dict(dict(values))
    reasons = []
    if set(config.mlp_layer_types) | set(getattr(config, "mtp_mlp_layer_types", None) or ()) != {"dense"}:
        reasons.append("it has mixture-of-experts layers")
    kinds = set(config.layer_types)
    rope = dict(config.rope_parameters or {})
    if mimo:
        rope = dict(rope.get("full_attention") or {})
        if kinds != {"full_attention"}:
            reasons.append("it has sliding windows with sinks")
        if config.head_dim != config.v_head_dim or config.attention_value_scale not in (None, 1.0):
            reasons.append("its values have a width or a scale of their own")
        if rope.pop("partial_rotary_factor", 0.334) != 1.0:
            reasons.append("it rotates a part of each head alone")
    elif kinds != {"sliding_attention"} or config.sliding_window < config.max_position_embeddings:
        reasons.append("it mixes sliding windows with layers that do not know positions")
    if reasons:
        raise IncompatibleModelError(
            f"heads cannot be attached to this {config.model_type} model: {'; '.join(reasons)}; headway reads it where every "
            f"layer is a dense block of llama, qwen2 or qwen3"
        )
    same = {name: getattr(config, name) for name in _SAME} | {"rope_parameters": rope, "head_dim": head_width(config)}
    if not mimo:
        return Qwen3Config(**same)
    return (Qwen2Config if config.attention_bias else LlamaConfig)(**same)


def same_model(one: Any, other: Any) -> bool:
    """Whether two configurations of a base describe the same computation, families aside."""
    fields = (*_SAME[:8], "rms_norm_eps", "tie_word_embeddings")
    return head_width(one) == head_width(other) and all(getattr(one, name) == getattr(other, name) for name in fields)
