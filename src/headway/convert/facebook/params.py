"""params.json of Meta's Llama layout, and the Hugging Face configuration that says the same.

Source: the released 7B code models (facebook/multi-token-prediction): Llama 2's parameters and `n_future_tokens`;
`n_layers` counts the extra heads, so that the next-token path has n_layers - n_future_tokens + 1 blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from headway.errors import CheckpointError, IncompatibleModelError

PARAMS_FILE = "params.json"
ROPE_THETA = 10000.0  # Llama 2's, where params.json does not give one
NORM_EPS = 1e-5  # Llama 2's
MULTIPLE_OF = 256  # Llama 2's

_INTEGERS = ("dim", "n_layers", "n_heads")
_OPTIONAL_INTEGERS = ("n_kv_heads", "multiple_of", "n_future_tokens", "max_seq_len")
_NUMBERS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
_WITHOUT_EFFECT = ("max_batch_size", "vocab_size")


@dataclass(frozen=True)
class FacebookParams:
    """The fields of params.json, with what stands in for those that are absent.

    Attributes:
        dim: width D.
        n_layers: blocks in all, those of the extra heads counted.
        n_heads: query heads.
        n_kv_heads: key-value heads.
        vocab_size: rows of the embedding; None where the file leaves it to the tokenizer (-1).
        multiple_of: the feed-forward width is rounded up to it.
        ffn_dim_multiplier: widens the feed-forward layer before rounding; None for 1.
        norm_eps: of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        n_future_tokens: n, the next token included.
        max_seq_len: longest context; None where the file does not say.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    multiple_of: int = MULTIPLE_OF
    ffn_dim_multiplier: float | None = None
    norm_eps: float = NORM_EPS
    rope_theta: float = ROPE_THETA
    n_future_tokens: int = 1
    max_seq_len: int | None = None

    @property
    def base_layers(self) -> int:
        """Blocks on the next-token path: `layers` of the state dict, L - n + 1."""
        return self.n_layers - self.n_future_tokens + 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Feed-forward width, by Llama's rule.

        >>> FacebookParams(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=32000).hidden_dim
        11008
        """
        return feed_forward_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    def to_json(self) -> str:
        """The text of params.json: `max_seq_len` is an argument of Meta's loader and must not be in it."""
        values = asdict(self)
        del values["max_seq_len"]
        if values["ffn_dim_multiplier"] is None:
            del values["ffn_dim_multiplier"]
        return json.dumps(values, indent=2) + "\n"


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of 4 dim, times the multiplier, rounded up to a multiple (Llama's model.py).

    >>> feed_forward_width(8192, 4096, 1.3)
    28672
    """
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def feed_forward_rule(dim: int, width: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give exactly this width.

    >>> feed_forward_rule(4096, 11008), feed_forward_rule(128, 352)
    ((256, None), (32, None))
    """
    powers = [2**power for power in range(12, -1, -1)]
    for multiple in [MULTIPLE_OF, *powers]:
        if feed_forward_width(dim, multiple, None) == width:
            return multiple, None
    multiple = math.gcd(width, MULTIPLE_OF)
    # Half a neuron away from a whole number, so that rounding of the product cannot cross one before it is truncated.
    return multiple, (width - 0.5 if multiple > 1 else width + 0.5) / int(2 * (4 * dim) / 3)


def read_params(folder: Path) -> FacebookParams:
    """Read and check params.json.

    Raises:
        CheckpointError: missing, damaged, or with values that make no model.
        IncompatibleModelError: a parameter whose meaning headway does not convert.
    """
    path = folder / PARAMS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {PARAMS_FILE}: it is not in facebook layout or half written", path=path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not an object")
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); restore it", path=path) from error
    _check_names(values, path)
    for name in _INTEGERS:
        if values.get(name) is None:
            raise CheckpointError(f"{path} lacks {name}; restore it", path=path)
    for name in (*_INTEGERS, *_OPTIONAL_INTEGERS):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{name} in {path} must be a whole number >= 1: got {value!r}; restore it", path=path)
    for name in _NUMBERS:
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise CheckpointError(f"{name} in {path} must be a number > 0: got {value!r}; restore it", path=path)
    vocabulary = values.get("vocab_size")
    if vocabulary is not None and (isinstance(vocabulary, bool) or not isinstance(vocabulary, int)):
        raise CheckpointError(f"vocab_size in {path} must be a whole number: got {vocabulary!r}; restore it", path=path)
    given = {
        name: values[name] for name in (*_INTEGERS, *_OPTIONAL_INTEGERS, *_NUMBERS) if values.get(name) is not None
    }
    given["n_kv_heads"] = given.get("n_kv_heads", given["n_heads"])
    params = FacebookParams(**given, vocab_size=vocabulary if vocabulary is not None and vocabulary > 0 else None)
    _check_shape(params, path)
    return params


def _check_names(values: dict[str, Any], path: Path) -> None:
    known = {*_INTEGERS, *_OPTIONAL_INTEGERS, *_NUMBERS, *_WITHOUT_EFFECT}
    # A parameter that is off or absent changes nothing, whatever its name.
    foreign = [
        f"{name}={value!r}" for name, value in values.items() if name not in known and value not in (None, False)
    ]
    if foreign:
        raise IncompatibleModelError(
            f"{path} has parameters that the facebook layout of this format does not have: {', '.join(foreign)}; headway "
            f"would ignore what they mean, so convert the model's Hugging Face version with --from hf"
        )


def _check_shape(params: FacebookParams, path: Path) -> None:
    if params.base_layers < 1:
        raise CheckpointError(
            f"{path} has n_layers={params.n_layers} for n_future_tokens={params.n_future_tokens}: n_layers counts the "
            f"n - 1 extra heads and must be at least n; restore it",
            path=path,
        )
    if params.dim % params.n_heads or params.head_dim % 2 or params.n_heads % params.n_kv_heads:
        raise CheckpointError(
            f"{path}: dim={params.dim}, n_heads={params.n_heads}, n_kv_heads={params.n_kv_heads} do not divide into heads of "
            f"an even width; restore it",
            path=path,
        )


def to_config(params: FacebookParams, *, vocab_size: int, max_position_embeddings: int, **others: Any) -> LlamaConfig:
    """The Hugging Face configuration of the base: L - n + 1 layers.

    Args:
        params: the fields of params.json.
        vocab_size: rows of the embedding.
        max_position_embeddings: longest context.
        others: further fields, such as token ids.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": params.dim,
        "intermediate_size": params.hidden_dim,
        "num_hidden_layers": params.base_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads,
        "rms_norm_eps": params.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": params.rope_theta},
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": False,  # the layout always has an output matrix
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**(fields | others))


def from_config(config: Any, *, num_future_tokens: int) -> FacebookParams:
    """The params.json of a llama base.

    Raises:
        IncompatibleModelError: anything that the layout has no field for; names it and the nearest alternative.
    """
    reasons = _what_does_not_fit(config)
    if reasons:
        raise IncompatibleModelError(
            f"facebook layout cannot hold this {config.model_type} model exactly: {'; '.join(reasons)}; write it as --to "
            f"headway, or as --to hf without heads"
        )
    multiple_of, multiplier = feed_forward_rule(config.hidden_size, config.intermediate_size)
    return FacebookParams(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers + num_future_tokens - 1,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        n_future_tokens=num_future_tokens,
    )


def _what_does_not_fit(config: Any) -> list[str]:
    if config.model_type != "llama":
        return ["it is Meta's Llama block alone (no norms on queries and keys, no sliding windows, no soft-capping)"]
    reasons = []
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"there is no field for rope scaling (rope_type={rope['rope_type']!r})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("there is no field for rotary embeddings of a part of each head")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        reasons.append(
            f"heads are dim / n_heads wide there ({config.hidden_size} / {config.num_attention_heads}), not {config.head_dim}"
        )
    if config.attention_bias or config.mlp_bias:
        reasons.append("its linear layers have no biases")
    if config.hidden_act != "silu":
        reasons.append(f"its activation is silu, not {config.hidden_act}")
    return reasons
