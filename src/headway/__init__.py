"""headway: train, understand and use multi-token prediction language models.

    from headway import MultiTokenConfig, MultiTokenLM, attach_heads

    model = attach_heads(causal_lm, MultiTokenConfig(num_future_tokens=4))
    ids = model.generate(input_ids, max_new_tokens=256)     # self-speculative, equal to greedy decoding token for token

Names are loaded on first use, so that `import headway` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.decoding.calibration.run import calibrate
    from headway.decoding.statistics import AcceptanceStatistics, GenerationResult
    from headway.errors import HeadwayError
    from headway.model.attach import attach_heads
    from headway.model.config import MultiTokenConfig
    from headway.model.multi_token_lm import MultiTokenLM
    from headway.model.output import MultiTokenOutput

__version__ = "0.1.0.dev0"

_HOMES = {
    "AcceptanceStatistics": "headway.decoding.statistics",
    "GenerationResult": "headway.decoding.statistics",
    "HeadwayError": "headway.errors",
    "MultiTokenConfig": "headway.model.config",
    "MultiTokenLM": "headway.model.multi_token_lm",
    "MultiTokenOutput": "headway.model.output",
    "attach_heads": "headway.model.attach",
    "calibrate": "headway.decoding.calibration.run",
}

__all__ = [
    "AcceptanceStatistics",
    "GenerationResult",
    "HeadwayError",
    "MultiTokenConfig",
    "MultiTokenLM",
    "MultiTokenOutput",
    "attach_heads",
    "calibrate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}; it has {', '.join(__all__)}")
    # The model room stands below the decoding room and cannot import it; whoever comes through this door gets both.
    if name in ("MultiTokenLM", "attach_heads"):
        import_module("headway.decoding.engine")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
