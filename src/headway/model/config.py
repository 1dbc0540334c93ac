"""`MultiTokenConfig`: what is added to a causal LM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from headway.errors import ConfigError

FORMAT_VERSION = 1
"""Version of `mtp/config.json`; raised when a reader of the old one would misread the new one."""

HeadArchitecture = Literal["transformer"]
Wiring = Literal["parallel"]
HeadInit = Literal["copy", "fresh"]


@dataclass(frozen=True, kw_only=True)
class MultiTokenConfig:
    """Heads, wiring and loss of a multi-token model.

    Attributes:
        num_future_tokens: n, tokens predicted per position including the next one; 1 is the plain model. Other projects
            count extra heads, n - 1.
        heads: architecture of heads 2..n; "transformer" is one decoder layer of the base's family per offset
            (Gloeckle et al. 2024, section 2).
        wiring: where a head reads; "parallel": every head from the trunk.
        offset_weights: n loss weights, offset 1 first; None means all 1, as in the paper.
        head_init: "copy" starts every head as the base's last layer, "fresh" draws it as the family draws a new layer.
        loss_chunk_tokens: rows of logits alive at once in the loss.

    Raises:
        ConfigError: a value outside its range.
    """

    num_future_tokens: int
    heads: HeadArchitecture = "transformer"
    wiring: Wiring = "parallel"
    offset_weights: tuple[float, ...] | None = None
    head_init: HeadInit = "copy"
    loss_chunk_tokens: int = 1024

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
        for name, choices in (("heads", HeadArchitecture), ("wiring", Wiring), ("head_init", HeadInit)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}: got {value!r}")
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` reads them back to an equal object."""
        values = asdict(self)
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
