"""How many layers the base keeps in a model of equal parameter count."""

from __future__ import annotations

import copy
from typing import Any

from headway.errors import ConfigError
from headway.model.config import MultiTokenConfig
from headway.model.families import check_config


def trunk_config(base_config: Any, mtp_config: MultiTokenConfig) -> Any:
    """The configuration of the base inside an L-layer multi-token model: L less the decoder layers of the heads.

    Raises:
        ConfigError: n is larger than the layers allow.
        IncompatibleModelError: an unsupported family.
    """
    check_config(base_config)
    total, future = int(base_config.num_hidden_layers), mtp_config.num_future_tokens
    taken = mtp_config.num_decoder_layers
    kept = total - taken
    if kept < 1:
        fits = 1 + (total - 1) * (future - 1) // taken
        raise ConfigError(
            f"num_future_tokens={future} needs at least {taken + 1} layers in all ({taken} of the heads and the base's "
            f"last): got num_hidden_layers={total}; lower num_future_tokens to {fits} or add layers"
        )
    config = copy.deepcopy(base_config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:kept])
    config.num_hidden_layers = kept
    return config
