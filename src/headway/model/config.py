"""`MultiTokenConfig`: what is added to a causal LM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, get_args

from headway.errors import ConfigError
from headway.heads.options import (
    CHANGES_BASE,
    ORDER_WINDOW,
    REGISTER_DISTANCE,
    Auxiliary,
    AuxiliaryOptions,
    HeadArchitecture,
    HeadInit,
    HeadOptions,
    Wiring,
    check_auxiliary,
    check_options,
    decoder_layers,
    options_from,
)

FORMAT_VERSION = 1
"""Version of `mtp/config.json`; raised when a reader of the old one would misread the new one."""

__all__ = ["FORMAT_VERSION", "HeadArchitecture", "HeadInit", "MultiTokenConfig", "Wiring"]


@dataclass(frozen=True, kw_only=True)
class MultiTokenConfig:
    """Heads, wiring and loss of a multi-token model.

    Attributes:
        num_future_tokens: n, tokens predicted per position including the next one; 1 is the plain model. Other projects
            count extra heads, n - 1.
        heads: architecture of heads 2..n; one file of `headway.heads` each. "transformer" is one decoder layer of the
            base's family per offset (Gloeckle et al. 2024, section 2).
        wiring: where a transformer head reads; "parallel": every head from the trunk. This field and those from
            `allow_base_change` to `markov_rank` are described in `headway.heads.options.HeadOptions`; each belongs to
            some architectures and is refused elsewhere.
        offset_weights: n loss weights, offset 1 first; None means all 1, as in the paper.
        head_init: "copy" starts every head from the base's own weights (a transformer head as its last layer, a linear,
            medusa, hydra or replicated one as the next-token head); "fresh" draws it as the family draws new weights.
        loss_chunk_tokens: rows of logits alive at once in the loss.
        auxiliary: an objective beside the prediction of tokens, of no use in decoding. This field and those after it are
            described in `headway.heads.options.AuxiliaryOptions`.

    Raises:
        ConfigError: a value outside its range, or an option that the architecture does not take.
    """

    num_future_tokens: int
    heads: HeadArchitecture = "transformer"
    wiring: Wiring = "parallel"
    offset_weights: tuple[float, ...] | None = None
    head_init: HeadInit = "copy"
    loss_chunk_tokens: int = 1024
    allow_base_change: bool = False
    layers_per_head: int = 1
    tap_back: int = 0
    blocks_per_head: int = 1
    own_unembedding: bool | None = None
    share_modules: bool = False
    own_output_norm: bool = False
    fuse_layers: bool = False
    markov_rank: int = 0
    auxiliary: Auxiliary = "none"
    auxiliary_weight: float | None = None
    order_window: int = ORDER_WINDOW
    register_distance: int = REGISTER_DISTANCE

    def __post_init__(self) -> None:
        if (
            isinstance(self.num_future_tokens, bool)
            or not isinstance(self.num_future_tokens, int)
            or self.num_future_tokens < 1
        ):
            raise ConfigError(
                f"num_future_tokens must be a whole number >= 1 (it includes the next token): got "
                f"{self.num_future_tokens!r}; pass 1 for the plain model, 4 for three extra heads"
            )
        if self.head_init not in get_args(HeadInit):
            raise ConfigError(f"head_init must be one of {', '.join(get_args(HeadInit))}: got {self.head_init!r}")
        check_options(self.heads, self.head_options)
        check_auxiliary(self.auxiliary_options)
        if self.offset_weights is not None:
            weights = tuple(float(weight) for weight in self.offset_weights)
            object.__setattr__(self, "offset_weights", weights)
            if len(weights) != self.num_future_tokens:
                raise ConfigError(
                    f"offset_weights needs one weight per offset: got {len(weights)} for num_future_tokens="
                    f"{self.num_future_tokens}; pass {self.num_future_tokens} numbers, offset 1 first"
                )
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
                raise ConfigError(f"offset_weights must be finite and >= 0: got {list(weights)}")
        if self.loss_chunk_tokens < 1:
            raise ConfigError(f"loss_chunk_tokens must be >= 1: got {self.loss_chunk_tokens}")

    @property
    def head_options(self) -> HeadOptions:
        """The fields that belong to some architectures only."""
        return options_from(self)

    @property
    def auxiliary_options(self) -> AuxiliaryOptions:
        """The fields of the auxiliary objective."""
        return AuxiliaryOptions(**{field.name: getattr(self, field.name) for field in fields(AuxiliaryOptions)})

    @property
    def changes_base(self) -> bool:
        """Whether the heads are part of the next-token path, so that the base alone is not a model."""
        return self.wiring in CHANGES_BASE and self.num_future_tokens > 1

    def check_attachable(self, *, num_layers: int) -> None:
        """Refuse heads that a base of so many layers cannot carry.

        Raises:
            ConfigError: heads in the next-token path without leave, or a layer to read that is not there.
        """
        if self.changes_base and not self.allow_base_change:
            raise ConfigError(
                f"wiring={self.wiring!r} puts the heads into the next-token path, so that a pretrained base is no longer "
                f"the model it was; train from scratch with MultiTokenLM.from_config, or pass allow_base_change=True"
            )
        if self.tap_back >= num_layers:
            raise ConfigError(
                f"tap_back={self.tap_back} reads before the first of the base's {num_layers} layers; pass at most "
                f"{num_layers - 1}"
            )
        if self.fuse_layers and num_layers < 3:
            raise ConfigError(f"fuse_layers reads three layers of the base: got a base of {num_layers}; leave it out")

    @property
    def num_decoder_layers(self) -> int:
        """Decoder layers that the heads own."""
        return decoder_layers(self.heads, self.head_options, num_heads=self.num_future_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` reads them back to an equal object.

        Options that ask for nothing are left out, so that what an older headway can read is written as it wrote it.
        """
        options = (*fields(HeadOptions), *fields(AuxiliaryOptions))
        later = {field.name: field.default for field in options if field.name != "wiring"}
        values = {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}
        if self.offset_weights is not None:
            values["offset_weights"] = list(self.offset_weights)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MultiTokenConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field (the message names the nearest one) or a bad value.
        """
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
                raise ConfigError(f"unknown field {name!r} in a multi-token configuration{hint}")
        if "num_future_tokens" not in values:
            raise ConfigError("a multi-token configuration needs num_future_tokens (n, the next token included)")
        arguments = dict(values)
        if arguments.get("offset_weights") is not None:
            arguments["offset_weights"] = tuple(arguments["offset_weights"])
        return cls(**arguments)
