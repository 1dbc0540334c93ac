"""The door through which the decoding room serves `MultiTokenLM.generate`.

The model room stands below the decoding room and cannot import it, so the engine registers itself here.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from headway.errors import DecodingError


class DecodingEngine(Protocol):
    """What the decoding room registers (`register_engine`), so that this room need not know it."""

    def generate(self, model: Any, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Serve `MultiTokenLM.generate`."""

    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Serve the sampling step of the Hugging Face `generate`."""


_engine: list[DecodingEngine] = []


def register_engine(engine: DecodingEngine) -> None:
    """Make `engine` the one that `MultiTokenLM.generate` uses; the last registration counts."""
    _engine[:] = [engine]


def registered_engine() -> DecodingEngine:
    """The engine that was registered last.

    Raises:
        DecodingError: none was; names the import.
    """
    if not _engine:
        raise DecodingError("no decoding engine is loaded; import headway.decoding.engine, or use headway.MultiTokenLM")
    return _engine[0]
