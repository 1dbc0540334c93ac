"""Head architectures by name and the options that each of them takes; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal, get_args

from headway.errors import ConfigError

HeadArchitecture = Literal["transformer", "linear", "replicated_unembedding", "medusa", "hydra", "sequential"]
Auxiliary = Literal["none", "top", "mutor"]
Wiring = Literal["parallel", "causal", "anticausal"]
HeadInit = Literal["copy", "fresh"]


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options that only some architectures take; a default asks for nothing.

    Attributes:
        wiring: where a transformer head reads. "parallel": every head from the trunk; "causal": offset k from the layer
            of offset k-1; "anticausal": offset k from the layer of offset k+1, the farthest from the trunk, offset 1 last.
        allow_base_change: let anticausal heads be put into a pretrained base, whose next-token path then runs through
            them all.
        layers_per_head: decoder layers of each transformer head.
        tap_back: read k layers earlier: transformer heads the input of layer L-k, all others the output of layer L-k (after
            the final norm where they read the final hidden state).
        blocks_per_head: residual SiLU blocks of each medusa or hydra head.
        own_unembedding: medusa and hydra: a [V, D] matrix per offset (the default there), or the base's for all.
        share_modules: sequential: one module applied again and again (FastMTP) instead of one per depth.
        own_output_norm: sequential: each module ends with a norm of its own, which also feeds the next depth, as
            released checkpoints have it, instead of the base's final norm.
        fuse_layers: sequential: the first depth reads a projection of three layers' residual streams, low, middle and high,
            instead of the final hidden state (EAGLE-3).
        markov_rank: width of a bias on the logits from the previously drafted token; 0 adds none.
    """

    wiring: Wiring = "parallel"
    allow_base_change: bool = False
    layers_per_head: int = 1
    tap_back: int = 0
    blocks_per_head: int = 1
    own_unembedding: bool | None = None
    share_modules: bool = False
    own_output_norm: bool = False
    fuse_layers: bool = False
    markov_rank: int = 0


_PARALLEL = frozenset({"markov_rank"})
OPTIONS_OF: dict[str, frozenset[str]] = {
    "transformer": _PARALLEL | {"wiring", "allow_base_change", "layers_per_head", "tap_back"},
    "linear": _PARALLEL | {"tap_back"},
    "replicated_unembedding": _PARALLEL | {"tap_back"},
    "medusa": _PARALLEL | {"tap_back", "blocks_per_head", "own_unembedding"},
    "hydra": frozenset({"tap_back", "blocks_per_head", "own_unembedding"}),
    "sequential": frozenset({"tap_back", "share_modules", "own_output_norm", "fuse_layers"}),
}
"""Architecture -> options that mean something for it; a value other than the default is refused elsewhere."""


READS_DRAFTS: frozenset[HeadArchitecture] = frozenset({"hydra", "sequential"})
"""Architectures whose heads read the tokens before an offset: known in training, drafted in decoding."""

CHANGES_BASE: frozenset[Wiring] = frozenset({"anticausal"})
"""Wirings in which heads are part of the next-token path."""


def decoder_layers(heads: HeadArchitecture, options: HeadOptions, *, num_heads: int) -> int:
    """Decoder layers of the base's family that the heads own, which a model from scratch takes from its trunk."""
    if heads == "transformer":
        return num_heads * options.layers_per_head
    if heads == "sequential":
        return min(num_heads, 1) if options.share_modules else num_heads
    return 0


def check_options(heads: str, options: HeadOptions) -> None:
    """Refuse values out of range and combinations that mean nothing, by name.

    Raises:
        ConfigError: names the option, what it was, and where it belongs.
    """
    if heads not in OPTIONS_OF:
        near = get_close_matches(str(heads), OPTIONS_OF, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"heads must be one of {', '.join(OPTIONS_OF)}: got {heads!r}{hint}")
    if options.wiring not in get_args(Wiring):
        raise ConfigError(f"wiring must be one of {', '.join(get_args(Wiring))}: got {options.wiring!r}")
    for name, smallest in (("layers_per_head", 1), ("blocks_per_head", 1), ("tap_back", 0), ("markov_rank", 0)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ConfigError(f"{name} must be a whole number >= {smallest}: got {value!r}")
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name not in OPTIONS_OF[heads]:
            takers = ", ".join(name for name, taken in OPTIONS_OF.items() if field.name in taken)
            raise ConfigError(
                f"{field.name}={value!r} means nothing for heads={heads!r}: only {takers} can have it; leave it out"
            )
    if options.tap_back and options.wiring != "parallel":
        raise ConfigError(
            f"tap_back={options.tap_back} needs wiring='parallel': with {options.wiring!r} heads read each other; leave "
            f"one of them out"
        )
    if options.tap_back and options.fuse_layers:
        raise ConfigError(
            f"tap_back={options.tap_back} and fuse_layers both say which layers the heads read; leave one of them out"
        )
    if options.allow_base_change and options.wiring != "anticausal":
        raise ConfigError(
            f"allow_base_change belongs to wiring='anticausal', no other changes the base: got wiring="
            f"{options.wiring!r}; leave it out"
        )


ORDER_WINDOW = 64
"""Tokens ahead that token-order prediction ranks: the weight of a distance d is exp(-d), far below rounding at the end."""
REGISTER_DISTANCE = 4
"""d_max, as MuToR recommends."""
_AUXILIARY_WEIGHTS: dict[str, float] = {"top": 1.0, "mutor": 0.3}
_AUXILIARY_FIELDS = {"order_window": "top", "register_distance": "mutor"}


@dataclass(frozen=True, kw_only=True)
class AuxiliaryOptions:
    """An objective that is trained beside the prediction of tokens and not used in decoding.

    Attributes:
        auxiliary: "top": token-order prediction, an unembedding of its own that ranks the vocabulary by how soon each
            token comes next (`headway.losses.token_order`); "mutor": register tokens, each of which predicts a token
            farther ahead and which no ordinary token sees (`headway.model.registers`).
        auxiliary_weight: factor of its loss beside that of the offsets; None: 1 for top, 0.3 for mutor.
        order_window: top: tokens ahead that are ranked.
        register_distance: mutor: the farthest that a register predicts; the distance is drawn for each row.
    """

    auxiliary: Auxiliary = "none"
    auxiliary_weight: float | None = None
    order_window: int = ORDER_WINDOW
    register_distance: int = REGISTER_DISTANCE

    @property
    def weight(self) -> float:
        """The factor, the objective's own where none is given."""
        return _AUXILIARY_WEIGHTS[self.auxiliary] if self.auxiliary_weight is None else self.auxiliary_weight


def check_auxiliary(options: AuxiliaryOptions) -> None:
    """Refuse an unknown objective, values out of range, and options of another objective.

    Raises:
        ConfigError: names the option, what it was, and where it belongs.
    """
    name = options.auxiliary
    if name not in get_args(Auxiliary):
        raise ConfigError(f"auxiliary must be one of {', '.join(get_args(Auxiliary))}: got {name!r}")
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in _AUXILIARY_FIELDS:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} must be a whole number >= 1: got {value!r}")
            owner = _AUXILIARY_FIELDS[field.name]
            if value != field.default and name != owner:
                raise ConfigError(f"{field.name}={value} means nothing for auxiliary={name!r}: only {owner} takes it")
    weight = options.auxiliary_weight
    if weight is not None and name == "none":
        raise ConfigError(f"auxiliary_weight={weight} needs an auxiliary objective: got auxiliary='none'; leave it out")
    if weight is not None and not (isfinite(weight) and weight >= 0):
        raise ConfigError(f"auxiliary_weight must be finite and >= 0: got {weight}")


def options_from(values: Any) -> HeadOptions:
    """The head options among the attributes of a configuration; those that it does not have ask for nothing."""
    found: dict[str, Any] = {field.name: getattr(values, field.name, field.default) for field in fields(HeadOptions)}
    return HeadOptions(**found)
